"""The command line's own subcommands: each is a function, and its arguments are the options."""

from collections.abc import Callable

from teamnet_pl.commands.blocks import show_blocks
from teamnet_pl.commands.configs import list_configs
from teamnet_pl.commands.export import export
from teamnet_pl.commands.profile import profile_teammate
from teamnet_pl.commands.serve import serve_teammate

COMMANDS: dict[str, Callable[..., None]] = {
    "blocks": show_blocks,
    "configs": list_configs,
    "profile": profile_teammate,
    "serve": serve_teammate,
    "export": export,
}

"""The command line's own subcommands: each is a function, and its arguments are the options."""

from collections.abc import Callable

from teamnet_pl.commands.blocks import show_blocks
from teamnet_pl.commands.export import export

COMMANDS: dict[str, Callable[..., None]] = {
    "blocks": show_blocks,
    "export": export,
}

__all__ = ["COMMANDS", "export", "show_blocks"]

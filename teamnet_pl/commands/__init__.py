"""The command line's own subcommands: each is a function, and its arguments are the options."""

from collections.abc import Callable

from teamnet_pl.commands.blocks import show_blocks

COMMANDS: dict[str, Callable[..., None]] = {
    "blocks": show_blocks,
}

__all__ = ["COMMANDS", "show_blocks"]

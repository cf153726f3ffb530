"""The answer to ``teamnet --help``: all subcommands, one line each."""

from __future__ import annotations

from teamnet_pl.cli.spelling import TRAINING
from teamnet_pl.commands import COMMANDS


def overview() -> str:
    """Lists the subcommands."""
    summaries = TRAINING | {name: command.summary for name, command in COMMANDS.items()}
    lines = [f"  {name:18}{summary}" for name, summary in summaries.items()]
    return "\n".join(
        [
            "usage: teamnet <command> [options]",
            "",
            *lines,
            "",
            "To start: teamnet fit --config digits",
            "The options of a command: teamnet <command> --help",
        ]
    )

"""Parsers that say what may have been meant, and our own subcommands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from jsonargparse import ArgumentParser

from teamnet_pl.cli.spelling import close_names
from teamnet_pl.commands import COMMANDS
from teamnet_pl.errors import TeamNetError


class SpellingParser(ArgumentParser):
    """Adds to a message about unknown names those that may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with the names that may have been meant, and exits."""
        unknown = re.findall(r"Option '([\w.]+)'|arguments: --([\w.]+)|path string: (\w+)", message)
        names = [next(filter(None, groups)) for groups in unknown]
        for name in dict.fromkeys(names):
            if close := close_names(name, set(self.known_names())):
                message += f"\n{name!r} is not known. {close}"
        super().error(message, ex)

    def known_names(self) -> Iterable[str]:
        """Yields all names that may have been meant."""
        return (option.removeprefix("--") for option in self._option_string_actions)


def run_command(name: str, words: list[str]) -> None:
    """Runs one of our own subcommands; errors of this package are printed without a traceback.

    Args:
        name: The subcommand.
        words: The words of the command line after it.
    """
    command = COMMANDS[name].load()
    parser = SpellingParser(prog=f"teamnet {name}", description=COMMANDS[name].summary)
    parser.add_argument("--config", action="config", help="Path to a YAML file of options.")
    parser.add_function_arguments(command, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--json` means `--json true`
            action.nargs, action.const = "?", True
    arguments = parser.instantiate(parser.parse_args(words)).as_dict()
    try:
        command(**{key: value for key, value in arguments.items() if key != "config"})
    except (OSError, ModuleNotFoundError, TeamNetError) as error:
        parser.error(str(error))

"""Parsers that say what may have been meant, and our own subcommands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from teamnet_pl.cli.last_run import LAST_RUN, last_run
from teamnet_pl.cli.messages import plain_message
from teamnet_pl.commands import COMMANDS
from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import did_you_mean

_OPTION = re.compile(r"[Nn]o (?:option|argument) '?(?:--)?([\w.]+)")
_CLASS = re.compile(r"the import path of a class.*found '(\w+)'")
_CHOICE = re.compile(r"takes one of (.*), found '([^']+)'")


class SpellingParser(ArgumentParser):
    """Reports an error in a few plain words, with the names that may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and where the options are listed, and exits."""
        message = plain_message(message)
        if "Did you mean" not in message:
            message = " ".join([message, *filter(None, self._questions(message))])
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        print(f"error: {message}\n`{command} --help` lists the options.", file=sys.stderr)
        self.exit(2)

    def _questions(self, message: str) -> Iterable[str]:
        """Asks for each unknown name in a message about those that may have been meant."""
        if choice := _CHOICE.search(message):
            yield did_you_mean(choice[2], choice[1].split(", "))
        names = set(self.known_names())
        classes = {name for name in names if name != name.lower()}
        for option in dict.fromkeys(_OPTION.findall(message)):
            yield did_you_mean(option, names - classes)
        for name in _CLASS.findall(message):
            yield did_you_mean(name, classes)

    def known_names(self) -> Iterable[str]:
        """Yields all names that may have been meant."""
        subcommands = self._subcommands_action.choices.values() if self._subcommands_action else ()
        for parser in (self, *subcommands):
            for name in parser._option_string_actions:
                if not name.endswith("+"):
                    yield name.removeprefix("--")

    def with_lists(self, words: list[str]) -> list[str]:
        """Writes the values of options that take a list as lists.

        ``--formats onnx`` becomes ``--formats [onnx]``, and so does ``--formats onnx hub``.

        Args:
            words: Of the command line.
        """
        written: list[str] = []
        rest = list(words)
        while rest:
            option, equals, text = rest.pop(0).partition("=")
            action = self._option_string_actions.get(option)
            element = _element(getattr(action, "_typehint", None))
            if element is None:
                written.append(option + equals + text)
                continue
            values = [text] if equals else []
            while rest and not equals and not re.match(r"--?[a-z]", rest[0]):
                values.append(rest.pop(0))
            written.append(option)
            is_written = len(values) == 1 and re.match(r"\s*\[|null$", values[0])
            if values and not is_written:
                values = [json.dumps(values) if element is str else f"[{','.join(values)}]"]
            written += values
        return written


def _element(kind: Any) -> Any:
    """The type of the elements, for the type of a list of texts, numbers or choices."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not type(None)]
        return _element(kinds[0]) if len(kinds) == 1 else None
    if get_origin(kind) is not list:
        return None
    (element,) = get_args(kind)
    return element if element in (str, int, float) or get_origin(element) is Literal else None


def run_command(name: str, words: list[str]) -> None:
    """Runs one of our own subcommands; errors of this package are printed without a traceback.

    Args:
        name: The subcommand.
        words: The words of the command line after it.
    """
    command = COMMANDS[name].load()
    if {"-h", "--help"} & set(words):
        words = ["--help"]
    parser = SpellingParser(prog=f"teamnet {name}", description=COMMANDS[name].summary)
    parser.add_argument("--config", action="config", help="Path to a YAML file of options.")
    parser.add_function_arguments(command, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--json` means `--json true`
            action.nargs, action.const = "?", True
    arguments = parser.instantiate(parser.parse_args(parser.with_lists(words))).as_dict()
    try:
        if arguments.get("ckpt_path") == LAST_RUN:
            arguments["ckpt_path"] = str(last_run())
        command(**{key: value for key, value in arguments.items() if key != "config"})
    except (OSError, ModuleNotFoundError, TeamNetError) as error:
        parser.error(str(error))

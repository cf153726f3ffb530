"""The parser's messages in plain words."""

from __future__ import annotations

import ast
import re

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as [1,2]",
    "dict": "a mapping such as {name: value}",
    "Iterable": "a list",
}
_KEY = re.compile(r'(?:- )?Parser key [\'"]([^\'"]+)[\'"]:(.*)')
_EXPECTED = re.compile(r"(?:- )?Expected (?:an? )?(.+?)(?:\. Got value: (.*))?")
_GIVEN = re.compile(r"Given value: (.*)")
_CLASS = re.compile(r"(?:an? )?dot import path string: (.*)")
_FORMS = {
    r"unrecognized arguments: (--\S+).*": r"There is no option \1.",
    r"unrecognized arguments: (\S+).*": r"There is no argument \1.",
    r"Subcommand '\w+' does not accept option '([^']+)'": r"There is no option --\1.",
    r"Option '([^']+)' is not accepted": r"no option '\1'.",
    r"the following arguments are required: (.*)": r"These options are required: \1.",
}
_CHATTER = re.compile(
    r"(?:- )?(Does not validate against|Subtypes:|Errors:|Given value type:|Problem with given "
    r"class_path|Expected (?:an? )?(?:<class 'NoneType'>|path but)).*"
)


def plain_message(message: str) -> str:
    r"""Rewrites a message about a value: the option, what it takes and what was found.

    Args:
        message: Of the parser. Messages of other forms are returned as they are.

    Examples:
        >>> plain_message('Parser key "runs":\n  Expected a <class \'int\'>. Got value: many')
        "--runs takes a whole number, found 'many'."
    """
    for form, plain in _FORMS.items():
        message = re.sub(form, plain, message)
    keys: list[str] = []
    kinds: list[str] = []
    others: list[str] = []
    given: str | None = None
    for line in map(str.strip, message.splitlines()):
        if key := _KEY.fullmatch(line):
            if key[1] not in keys:
                keys.append(key[1])
            others += [key[2].strip()] if key[2].strip() else []
        elif value := _GIVEN.fullmatch(line):
            if not value[1].startswith("NestedArg("):
                given = value[1]
        elif line and not _CHATTER.fullmatch(line):
            if expected := _EXPECTED.fullmatch(line):
                kinds.append(_kind(expected[1]))
                if name := _CLASS.fullmatch(expected[1]):
                    given = name[1]
                given = given if expected[2] is None else expected[2]
            else:
                others.append(line)
    if not keys or not (kinds or others):
        return message
    option = "--" + ".".join(keys)
    if others:  # they say more than the kinds of the alternatives
        text = f"{option}: {' '.join(dict.fromkeys(others))}"
        return re.sub(r"^(--[\w.]+): --", r"\1.", text)  # of a class, whose parser is another one
    found = "" if given is None else f", found {given!r}"
    return f"{option} takes {' or '.join(dict.fromkeys(kinds))}{found}."


def _kind(text: str) -> str:
    """Describes a type as the parser writes it."""
    if _CLASS.fullmatch(text):
        return "the import path of a class, or its name if it belongs to this package or Lightning"
    if literal := re.fullmatch(r"typing\.Literal(\[.*\])", text):
        return f"one of {', '.join(map(str, ast.literal_eval(literal[1])))}"
    name = re.sub(r"<class '(.*)'>", r"\1", text).rpartition(".")[2]
    return _KINDS.get(name, text)

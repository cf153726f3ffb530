"""The words of a command line, before any parser has seen them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from teamnet_pl.cli.spelling import TRAINING
from teamnet_pl.config_files import config_path

_CONFIG = ("--config", "-c")


def with_config_files(words: list[str]) -> list[str]:
    """Replaces the names of configs that come with the package by their files.

    Args:
        words: Of the command line.

    Returns:
        The same words, each config a file or YAML text.

    Raises:
        TeamNetError: If there is no such file and no config of that name.
    """
    replaced = list(words)
    for index, word in enumerate(words):
        option, equals, text = word.partition("=")
        if option not in _CONFIG:
            continue
        if equals:
            replaced[index] = f"{option}={_config(text)}"
        elif index + 1 < len(words):
            replaced[index + 1] = _config(words[index + 1])
    return replaced


def _config(text: str) -> str:
    is_yaml = any(mark in text for mark in ("\n", "{", ": "))
    return text if is_yaml else str(config_path(text))


def given_values(words: list[str]) -> dict[str, Any]:
    """Reads the values in a command line and its config files, by their dotted name.

    Arguments of the data module are called ``data.init_args.<name>``, as in a config.

    Args:
        words: Of the command line.
    """
    values: dict[str, Any] = {}
    for index, word in enumerate(words):
        if not word.startswith("-"):
            continue
        name, equals, text = word.lstrip("-").partition("=")
        following = words[index + 1 : index + 2]
        if not equals:
            text = following[0] if following and not following[0].startswith("--") else "true"
        try:
            if name in ("config", "c"):
                text = Path(text).read_text() if Path(text).is_file() else text
                values |= _flat(yaml.safe_load(text))
                continue
            value = yaml.safe_load(text)
        except (OSError, yaml.YAMLError):  # which the parser reports
            value = text
        parent, _, field = name.rpartition(".")
        if name == "data" and isinstance(value, str):
            name = "data.class_path"
        elif parent == "data" and field not in ("class_path", "init_args"):
            name = f"data.init_args.{field}"
        values |= _flat(value, name)
    # A config before the subcommand holds its options under its name.
    prefix = f"{subcommand_of(words)}."
    return {name.removeprefix(prefix): value for name, value in values.items()}


def subcommand_of(words: list[str]) -> str | None:
    """Finds the subcommand of LightningCLI in a command line, None if there is none."""
    return next((word for word in words if word in TRAINING), None)


def _flat(value: object, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    values: dict[str, Any] = {}
    for key, inner in value.items():
        values |= _flat(inner, f"{name}.{key}" if name else str(key))
    return values

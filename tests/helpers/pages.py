"""The code on the pages of the documentation, and a cheap way to run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from teamnet_pl import cli

TEAM = yaml.safe_dump(
    {
        "model": {
            "leader": {"options": {"width": 4}},
            "a": {"options": {"width": 4}},
            "b": {"options": {"width": 4}},
        }
    }
)
"""Tiny nets at the depths of the default team, which the pages name."""
FAST = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"),
    *("--trainer.strategy", "auto", "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"),
]


class CodeBlock(NamedTuple):
    """A fenced block.

    Attributes:
        language: Its language.
        title: Name of the file that it stands for, or an empty string.
        text: Its lines.
    """

    language: str
    title: str
    text: str


def code_blocks(page: Path) -> Iterator[CodeBlock]:
    """The fenced blocks of a page that have a language."""
    pattern = r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$'
    for match in re.finditer(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
        yield CodeBlock(match[1], match[2] or "", match[3])


def commands(script: str) -> Iterator[list[str]]:
    """The words after each ``teamnet`` in a shell script, whatever launches it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "teamnet" in words:
            yield words[words.index("teamnet") + 1 :]


def run_command(words: Sequence[str], parse_only: Sequence[str] = ()) -> None:
    """Runs a command line in this process, with a training of one epoch on tiny nets.

    Args:
        words: The words after ``teamnet``.
        parse_only: With one of these among the words, they are only parsed: what the command needs
            is not here, such as ImageNet or an account.
    """
    subcommand, *options = words
    if any(name in option for name in parse_only for option in options):
        with pytest.raises(SystemExit) as ending:
            cli.main([subcommand, *options, "--print_config"])
        assert ending.value.code in (0, None)
    elif subcommand == "fit" and "--ckpt_path" not in options:
        # A net that the page names keeps its own size.
        tiny = [] if any(option.endswith(".name") for option in options) else ["--config", TEAM]
        cli.main([subcommand, *tiny, *options, *FAST])
    elif subcommand == "fit":
        cli.main([subcommand, *options, *FAST])
    else:
        cli.main(list(words))


def run_page(
    page: Path, folder: Path, names: dict[str, Any], parse_only: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs all blocks of a page one after the other in a folder.

    Files are written, Python runs in one namespace, and of shell scripts the lines with
    ``teamnet`` run.

    Args:
        page: The page.
        folder: The current folder of the code.
        names: The namespace to begin with.
        parse_only: See `run_command`.

    Returns:
        The namespace after the last block.
    """
    names["__name__"] = page.stem
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        main = cli.main
        for block in code_blocks(page):
            if block.title:
                Path(block.title).write_text(block.text)
            if block.language == "python":
                with pytest.MonkeyPatch.context() as cheap:
                    cheap.setattr(
                        cli, "main", lambda words: main([*words, "--config", TEAM, *FAST])
                    )
                    exec(compile(block.text, page.name, "exec"), names)
            elif block.language == "bash":
                for words in commands(block.text):
                    run_command(words, parse_only)
    return names

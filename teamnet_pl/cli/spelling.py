"""Names that may have been meant by a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from teamnet_pl.commands import COMMANDS
from teamnet_pl.errors import TeamNetError

TRAINING = ("fit", "validate", "test", "predict")
"""The subcommands of LightningCLI."""
GROUPS = (
    "c",
    "checkpoint",
    "ckpt_path",
    "config",
    "dashboards",
    "data",
    "h",
    "help",
    "last",
    "model",
    "print_config",
    "report",
    "return_predictions",
    "seed_everything",
    "test_after_fit",
    "trainer",
    "trust_import",
    "verbose",
    "version",
    "weights_only",
)
"""The first parts of the names of their options, which are known before Lightning is imported."""


def close_names(name: str, names: Collection[str]) -> str:
    """Writes a question about the names that may have been meant; empty if there are none.

    Examples:
        >>> close_names("fti", ["fit", "test"])
        'Did you mean fit?'
    """
    close = difflib.get_close_matches(name, names, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def check_spelling(words: list[str]) -> None:
    """Refuses an unknown subcommand, and an option of which the first part is unknown.

    Args:
        words: Of the command line.

    Raises:
        TeamNetError: If there is one.
    """
    subcommands = (*TRAINING, *COMMANDS)
    if words and not words[0].startswith("-") and words[0] not in subcommands:
        raise TeamNetError(
            f"There is no subcommand {words[0]!r}. {close_names(words[0], subcommands)} There are "
            f"{', '.join(subcommands)}."
        )
    for word in words:
        name = word.removeprefix("--").partition("=")[0].removesuffix("+")
        if word.startswith("--") and name and name.partition(".")[0] not in GROUPS:
            raise TeamNetError(
                f"There is no option --{name}. {close_names(name.partition('.')[0], GROUPS)} "
                "`teamnet fit --help` lists all options."
            )

"""Misspelt words of a command line."""

from __future__ import annotations

from teamnet_pl import data
from teamnet_pl.commands import COMMANDS
from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import did_you_mean

TRAINING = {
    "fit": "Trains a team.",
    "validate": "Measures every depth on the validation images.",
    "test": "Measures every depth on the test images.",
    "predict": "Writes the predicted class of each image of the test split.",
}
"""The subcommands of LightningCLI, with what they do."""
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
    "weights_only",
)
"""The first parts of the names of their options, which are known before Lightning is imported."""


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
            f"There is no subcommand {words[0]!r}. {did_you_mean(words[0], subcommands)} There are "
            f"{', '.join(subcommands)}."
        )
    for word in words:
        name = word.removeprefix("--").partition("=")[0].removesuffix("+")
        if word.startswith("--") and name and name.partition(".")[0] not in GROUPS:
            meant = did_you_mean(name.partition(".")[0], (*GROUPS, "images"))
            raise TeamNetError(
                f"There is no option --{name}. {meant} `teamnet fit --help` lists all options."
            )


def with_data_names(words: list[str]) -> list[str]:
    """Writes the data module as its class is called: ``fashion_mnist`` is ``FashionMNIST``.

    Args:
        words: Of the command line.
    """
    classes = {name.lower(): name for name in data.__all__}

    def class_name(text: str) -> str:
        return classes.get(text.lower().replace("_", ""), text)

    written = list(words)
    for index, word in enumerate(words):
        option, equals, text = word.partition("=")
        if option not in ("--data", "--data.class_path"):
            continue
        if equals:
            written[index] = f"{option}={class_name(text)}"
        elif index + 1 < len(words):
            written[index + 1] = class_name(words[index + 1])
    return written

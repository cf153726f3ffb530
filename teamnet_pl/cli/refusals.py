"""Command lines that lack what they need, refused before anything large is imported."""

from __future__ import annotations

from typing import Any

from teamnet_pl.cli.words import given_values, subcommand_of
from teamnet_pl.errors import TeamNetError

_INFORMATION = ("-h", "--help", "--print_config")
_LENGTHS = ("max_epochs", "max_steps", "max_time", "fast_dev_run")


def check_complete(words: list[str]) -> None:
    """Refuses a training without data or without an end, and an evaluation of random weights.

    Args:
        words: Of the command line.

    Raises:
        TeamNetError: If it lacks something, or gives the file of a checkpoint by another option.
    """
    subcommand = subcommand_of(words)
    if subcommand is None or any(word.partition("=")[0] in _INFORMATION for word in words):
        return
    given = given_values(words)
    file = given.get("checkpoint")
    if isinstance(file, str) and not file.endswith((".yaml", ".yml", ".json")):
        raise TeamNetError(
            f"--checkpoint sets which checkpoints are saved. To use the file {file}: teamnet "
            f"{subcommand} --ckpt_path {file}"
        )
    if given.get("ckpt_path") is not None:
        return
    if subcommand == "fit":
        _check_training(given)
    elif not _has_weights(given):
        raise TeamNetError(
            f"teamnet {subcommand} needs a trained team, whose checkpoint `teamnet fit` saves: "
            "--ckpt_path FILE, or --ckpt_path last-run for the newest run here."
        )


def _check_training(given: dict[str, Any]) -> None:
    if not any(name.partition(".")[0] == "data" for name in given):
        raise TeamNetError(
            "teamnet fit needs data: a config that has some, such as --config digits or --config "
            "data/cifar10 (`teamnet configs` lists them), or a data module, such as --data Digits."
        )
    trainer = given.get("trainer")  # perhaps a file
    lengths = (given.get(f"trainer.{name}") for name in _LENGTHS)
    if not isinstance(trainer, str) and all(length is None for length in lengths):
        raise TeamNetError(
            "teamnet fit needs to know when to end, such as --trainer.max_epochs 30, "
            "--trainer.max_steps 5000 or --trainer.max_time 00:02:00:00 (two hours)."
        )


def _has_weights(given: dict[str, Any]) -> bool:
    """Whether a member starts from weights that were trained elsewhere."""
    members = {name: value for name, value in given.items() if name.startswith("model")}
    return any(
        value is not None and value is not False
        for name, value in members.items()
        if name == "model" or name.rpartition(".")[2] in ("checkpoint", "pretrained", "weights")
    )

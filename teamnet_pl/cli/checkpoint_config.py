"""The config of the checkpoint that a command line names."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from teamnet_pl.cli.last_run import LAST_RUN, last_run
from teamnet_pl.cli.spelling import TRAINING
from teamnet_pl.cli.words import given_values
from teamnet_pl.cooperation import Cooperation
from teamnet_pl.deploy.checkpoint import SavedTeam

FROM_DATA = ("num_classes", "input_shape")
"""Arguments of the team that its data tells."""


def with_checkpointed_config(words: list[str]) -> tuple[list[str], SavedTeam | None]:
    """Puts the config of a named checkpoint in front of the subcommand's other options.

    Only the arguments of the team and of the data module are taken, after a check of the names in
    them; a training that goes on also takes over the settings that it had.

    Args:
        words: Of the command line.

    Returns:
        The words with the config, and the checkpoint that was read; None if the command line names
        none.

    Raises:
        FileNotFoundError: If there is no such file.
        TeamNetError: If it is not a checkpoint of a team, is damaged, or names code or an address
            that is not trusted.
    """
    given = given_values(words)
    path = given.get("ckpt_path")
    if path is None:
        return words, None
    if path == LAST_RUN or path in _SEARCHED:
        path = last_run() if path == LAST_RUN else _find_checkpoint(path, given)
        # Not as Lightning looks for it, which starts anew if there is none.
        words = [*words, "--ckpt_path", str(path)]
    trust_import = given.get("trust_import") is True
    saved = SavedTeam.read(str(path), trust_import, given, map_location="meta")
    arguments = {
        name: _plain(value) for name, value in saved.arguments().items() if name not in FROM_DATA
    }
    config: dict[str, Any] = {"model": arguments}
    stored, named = saved.run.get("data"), given.get("data.class_path")
    # The arguments of another data module have nothing in common with the user's.
    replaced = named is not None and not (
        isinstance(stored, dict) and _same_class(named, stored.get("class_path"))
    )
    if stored is not None and not replaced:
        config["data"] = saved.data()
    subcommand = next((i for i, word in enumerate(words) if word in TRAINING), 0)
    if words[subcommand] == "fit":
        config |= saved.settings()
    first = 1 + subcommand
    return [*words[:first], "--config", yaml.safe_dump(config), *words[first:]], saved


_SEARCHED = {"best": "best*.ckpt", "last": "last*.ckpt", "hpc": "hpc_ckpt_*.ckpt"}


def _find_checkpoint(kind: str, given: dict[str, Any]) -> Path:
    """The newest checkpoint of a kind in the folder of checkpoints or logs that is in use.

    Raises:
        FileNotFoundError: If there is none.
    """
    if kind == "hpc":  # saved by Lightning, where SLURM stops a job
        folder, pattern = given.get("trainer.default_root_dir"), _SEARCHED[kind]
    elif given.get("checkpoint.dirpath") is not None:
        folder, pattern = given["checkpoint.dirpath"], _SEARCHED[kind]
    else:
        folder = given.get("trainer.logger.init_args.save_dir", "logs")
        pattern = f"**/checkpoints/{_SEARCHED[kind]}"
    place = Path(str(folder or "."))
    # Not `max` by the time alone: on some disks it has few digits.
    paths = sorted(place.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    if not paths:
        raise FileNotFoundError(
            f"There is no checkpoint for --ckpt_path {kind}: no file {pattern} in "
            f"{place.resolve()}. Give the file itself, or leave --ckpt_path out to start anew."
        )
    return paths[-1]


def _plain(value: object) -> object:
    """A config of a member or of the team as plain values."""
    if isinstance(value, Cooperation):
        return value.describe()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _same_class(given: object, stored: object) -> bool:
    """Whether a class path that the user gave, which may be the bare name, is the stored one."""
    return given == stored or f"teamnet_pl.data.{given}" == stored

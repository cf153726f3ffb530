"""The settings of a run that a checkpoint restores: numbers, flags and keywords, not code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from teamnet_pl.errors import TeamNetError

_NUMBER = (int, float, type(None))
_INTEGER = (int, type(None))
_FLAG = (bool, type(None))
_KEYWORD = (str, int, bool, type(None))
# Without the options that belong to the machine (devices, strategy), or that name code (callbacks,
# profiler, logger) or a folder.
_TRAINER: dict[str, tuple[type, ...]] = {
    "precision": _KEYWORD,
    "max_epochs": _INTEGER,
    "min_epochs": _INTEGER,
    "max_steps": _INTEGER,
    "min_steps": _INTEGER,
    "max_time": _KEYWORD,
    "limit_train_batches": _NUMBER,
    "limit_val_batches": _NUMBER,
    "limit_test_batches": _NUMBER,
    "overfit_batches": _NUMBER,
    "val_check_interval": (*_NUMBER, str),
    "check_val_every_n_epoch": _INTEGER,
    "num_sanity_val_steps": _INTEGER,
    "log_every_n_steps": _INTEGER,
    "accumulate_grad_batches": _INTEGER,
    "gradient_clip_val": _NUMBER,
    "gradient_clip_algorithm": _KEYWORD,
    "deterministic": _KEYWORD,
    "benchmark": _FLAG,
    "inference_mode": _FLAG,
    "use_distributed_sampler": _FLAG,
    "detect_anomaly": _FLAG,
    "sync_batchnorm": _FLAG,
    "reload_dataloaders_every_n_epochs": _INTEGER,
}
_RUN: dict[str, tuple[type, ...]] = {"seed_everything": (int, bool), "test_after_fit": _FLAG}


def run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the settings that a resumed run takes over.

    Args:
        config: The config of the command line.

    Returns:
        The settings, in the form of the config.

    Examples:
        >>> run_settings({"test_after_fit": True, "trainer": {"max_epochs": 3, "logger": "X"}})
        {'test_after_fit': True, 'trainer': {'max_epochs': 3}}
    """
    trainer = config.get("trainer") or {}
    return {
        name: config[name] for name, kind in _RUN.items() if _fits(config.get(name, ...), kind)
    } | {
        "trainer": {
            name: trainer[name]
            for name, kind in _TRAINER.items()
            if _fits(trainer.get(name, ...), kind)
        }
    }


def check_settings(source: object, settings: object) -> dict[str, Any]:
    """Checks settings that come from a file.

    Args:
        source: The file, for messages.
        settings: Settings in the form that `run_settings` returns.

    Returns:
        The settings.

    Raises:
        TeamNetError: If there are other settings, or a value is not a number, a flag or a keyword.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("trainer", {}), Mapping):
        raise TeamNetError(f"{source}: settings must be a mapping, found {settings!r}.")
    trainer = settings.get("trainer", {})
    known = {f"trainer.{name}": kind for name, kind in _TRAINER.items()} | _RUN
    values = {f"trainer.{name}": value for name, value in trainer.items()}
    values |= {name: value for name, value in settings.items() if name != "trainer"}
    for name, value in values.items():
        if name not in known:
            raise TeamNetError(
                f"{source} sets {name}, which a checkpoint may not set. Give the options of the "
                "run yourself, or use another copy of the file."
            )
        if not _fits(value, known[name]):
            raise TeamNetError(
                f"{source}: {name} cannot be {value!r}. Use another copy of the file."
            )
    return {**settings, "trainer": dict(trainer)}


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    # Not `isinstance`: True is also an int.
    return type(value) in kinds and (
        not isinstance(value, str) or re.fullmatch(r"[\w:-]{1,32}", value) is not None
    )

"""Reading files with weights, without running anything in them, and what else checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from teamnet_pl.data import ImageDataModule

CONFIG_KEY = "teamnet_config"
"""Where a checkpoint holds, as YAML text, what makes its team and its data."""


def load_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """Loads a file that `torch.save` wrote, as tensors and plain values.

    Args:
        path: The file.
        map_location: Device that the tensors go to.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, holds more than tensors and plain values (which are never
            run), or is no dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over
        raise ValueError(
            f"{path} is no checkpoint: it does not load as tensors and plain values "
            f"({type(error).__name__})."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(found).__name__}, not a dict.")
    return found


def checkpointed_data(checkpoint: dict[str, Any]) -> ImageDataModule | None:
    """Makes the data module that a checkpoint was trained on; no data is read yet.

    Args:
        checkpoint: As `load_checkpoint` returns it.

    Returns:
        The data module, or None where the checkpoint does not say.

    Raises:
        ValueError: If it says something that there is not.
    """
    if CONFIG_KEY not in checkpoint:
        return None
    config = yaml.safe_load(checkpoint[CONFIG_KEY])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    try:
        made = parser.instantiate(parser.parse_object({"data": config["data"]}))
    except ArgumentError as error:
        raise ValueError(f"The data that the checkpoint names cannot be made: {error}") from error
    data: ImageDataModule = made["data"]
    return data

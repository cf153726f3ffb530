"""What a checkpoint says of the data that its team was trained on."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from teamnet_pl.checkpoints import CONFIG_KEY
from teamnet_pl.data import ImageDataModule


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
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    try:
        made = parser.instantiate(parser.parse_object({"data": config["data"]}))
    except ArgumentError as error:
        raise ValueError(f"The data that the checkpoint names cannot be made: {error}") from error
    data: ImageDataModule = made["data"]
    return data

"""A Teammate of a checkpoint on its device, and what its images need."""

from __future__ import annotations

from pathlib import Path

import torch

from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.deploy.checkpointed import checkpointed_data
from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.images import Preprocessing


def load_teammate(
    path: str | Path, teammate: str = "a", device: str | torch.device = "cpu"
) -> Teammate:
    """Loads one Teammate of a team.

    Args:
        path: The checkpoint.
        teammate: ``a`` or ``b``.
        device: Where to put it.

    Returns:
        The net, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a team, the team has no such Teammate, or there is
            no such device.
    """
    net = Teammate.from_checkpoint(path, teammate)
    try:
        return net.to(device)
    except (AssertionError, RuntimeError) as error:  # the former from a torch without CUDA
        raise ValueError(f"The net cannot be put on {device}: {error}") from error


def load_preprocessing(path: str | Path) -> Preprocessing:
    """Makes the preprocessing of the images that a team was trained on.

    Args:
        path: The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not say what data it was trained on, or that cannot be made.
    """
    hint = "Make a Predictor with a Preprocessing of your own."
    checkpoint = load_checkpoint(path, map_location="meta")
    try:
        data = checkpointed_data(checkpoint)
    except Exception as error:  # whatever a data module of the user's own stumbles over
        raise ValueError(f"The data that {path} names cannot be made: {error}. {hint}") from error
    if data is None:
        raise ValueError(f"{path} does not say what data the team was trained on. {hint}")
    return Preprocessing(data.input_shape, data.mean, data.std, data.eval_transform())

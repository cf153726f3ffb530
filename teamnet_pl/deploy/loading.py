"""A Teammate of a checkpoint, and what its images need, without running pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import instantiate_module

from teamnet_pl.checkpoints import CONFIG_KEY, load_checkpoint
from teamnet_pl.cooperation import Team
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy.images import Preprocessing
from teamnet_pl.elastic import ElasticNet


def load_teammate(
    path: str | Path, teammate: str = "a", device: str | torch.device = "cpu"
) -> ElasticNet:
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
    checkpoint = load_checkpoint(path)
    hparams: dict[str, Any] | None = checkpoint.get("hyper_parameters")
    if hparams is None or "state_dict" not in checkpoint:
        raise ValueError(
            f"{path} is no checkpoint of a team: it holds {', '.join(map(str, checkpoint))}. Pass "
            "one that `teamnet fit` wrote."
        )
    # Not by Lightning's own loading: it would call whatever the checkpoint names for that.
    config = {key: value for key, value in hparams.items() if not key.startswith("_")}
    try:
        team: Team = instantiate_module(Team, config)
        team.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # whatever a backbone of the user's own stumbles over
        raise ValueError(f"{path} does not make a team: {error}") from error
    if teammate not in team.elastic_nets:
        names = ", ".join(team.elastic_nets)
        raise ValueError(f"The team in {path} has the Teammates {names}; found {teammate}.")
    try:
        return team.elastic_nets[teammate].to(device).eval()
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
    config = load_checkpoint(path, map_location="meta").get(CONFIG_KEY)
    hint = "Make a Predictor with a Preprocessing of your own."
    if config is None:
        raise ValueError(f"{path} does not say what data the team was trained on. {hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    try:
        parsed = parser.parse_object({"data": yaml.safe_load(config)["data"]})
        data: ImageDataModule = parser.instantiate(parsed).data
    except Exception as error:  # whatever a data module of the user's own stumbles over
        raise ValueError(f"The data that {path} names cannot be made: {error}. {hint}") from error
    return Preprocessing(data.input_shape, data.mean, data.std, data.eval_transform())

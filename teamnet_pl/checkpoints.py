"""Reading files with weights, without running anything in them, and telling weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CONFIG_KEY = "teamnet_config"
"""Where a checkpoint of the command line keeps the config of team and data, as YAML text."""


def load_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """Loads a file that `torch.save` or safetensors wrote, as tensors and plain values.

    Args:
        path: The file; one of safetensors is told by its name's end.
        map_location: Device that the tensors go to.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, holds more than tensors and plain values (which are never
            run), or is no dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path, device=map_location)
        found = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over
        raise ValueError(
            f"{path} is no checkpoint: it does not load as tensors and plain values "
            f"({type(error).__name__})."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(found).__name__}, not a dict.")
    return found


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A name for weights: the same for the same values under the same names, on any device.

    Args:
        state: As ``state_dict()`` returns it.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

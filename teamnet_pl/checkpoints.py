"""Reading files with weights, without running anything in them, and telling weights apart."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Loads a file that `torch.save` or safetensors wrote, as tensors and plain values.

    Args:
        path: The file; a name that ends in ``.safetensors`` is of that format.
        map_location: Device that the tensors go to.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, is damaged (by the checksums in it), holds more than
            tensors and plain values (nothing else is unpickled), or is not a dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=map_location)
        # torch.load itself does not look at the checksums that torch.save wrote.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler raises whatever a hostile file makes it raise
        reason = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
        raise ValueError(
            f"{path} is not a checkpoint, or is damaged: it does not load as tensors and plain "
            f"values ({type(error).__name__}{reason}). Use another copy of the file."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict."
        )
    return content


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

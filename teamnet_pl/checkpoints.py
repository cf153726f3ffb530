"""Weight files, read without running code in them, and limits for what they hold."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from teamnet_pl.errors import TeamNetError


def load_checkpoint(
    path: str | Path, map_location: Any = "cpu", plain_classes: Sequence[type] = ()
) -> dict[str, Any]:
    """Loads a file written by `torch.save` or safetensors, as tensors and plain values.

    Args:
        path: The file; the name of a safetensors file ends in ``.safetensors``.
        map_location: Device of the loaded tensors.
        plain_classes: Classes of objects that count as plain values: they only hold attributes.

    Raises:
        FileNotFoundError: If there is no such file.
        TeamNetError: If the file has another format, is damaged (by its checksums), holds more than
            tensors and plain values (nothing else is unpickled), or does not hold a dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=map_location)
        # torch.load does not verify the checksums written by torch.save.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals(list(plain_classes)):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise errors of any class
        reason = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
        raise TeamNetError(
            f"{path} is not a checkpoint, or is damaged: it does not load as tensors and plain "
            f"values ({type(error).__name__}{reason}). Use another copy of the file."
        ) from error
    if not isinstance(content, dict):
        raise TeamNetError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict."
        )
    return content


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Computes a digest of weights that depends on their names and values, not on the device.

    Args:
        state: A state dict.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Refuses weights that are infinite or NaN.

    Args:
        weights: The weights by name.
        source: Their file or net, for messages.

    Raises:
        TeamNetError: If a weight is infinite or NaN; the message names the first such tensor.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            wrong = int((~weight.isfinite()).sum())
            raise TeamNetError(
                f"{source} has weights that are infinite or NaN: {wrong:,} of {weight.numel():,} "
                f"values of {name}, the first such tensor. Use an earlier checkpoint."
            )


@contextmanager
def limit_parameters(size: int, source: object) -> Iterator[None]:
    """Stops the construction of a net that is much larger than the weights it is made for.

    Otherwise, a single value in a file, such as a width, could take all memory of the machine.

    Args:
        size: Number of weights. Twice as many parameters are allowed, and a few million more.
        source: The file of the weights, for messages.

    Raises:
        TeamNetError: As soon as the net exceeds the limit.
    """
    left, thread = 2 * size + 2**24, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != thread:
            return
        left -= parameter.numel()
        if left < 0:
            raise TeamNetError(
                f"{source} names a net that is larger than the {size:,} weights in the file."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def count_weights(weights: Mapping[str, Tensor]) -> int:
    """Counts the numbers in a state dict."""
    return sum(weight.numel() for weight in weights.values())

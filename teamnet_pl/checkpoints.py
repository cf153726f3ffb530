"""Files with weights: read without running anything in them, and written whole or not at all."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from teamnet_pl.atomic import replacing
from teamnet_pl.errors import TeamNetError


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


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Refuses weights that are infinite or NaN.

    Args:
        weights: By name.
        source: What they belong to, for messages.

    Raises:
        ValueError: If one is; the message names the first such tensor.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            wrong = int((~weight.isfinite()).sum())
            raise TeamNetError(
                f"{source} has weights that are infinite or NaN: {wrong:,} of {weight.numel():,} "
                f"values of {name}, the first such tensor. Use a checkpoint from before they were."
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints such that a file is the old one or the new one, whole, whatever happens.

    Lightning's own way writes to the system's temporary folder and copies over the old file. The
    command line uses this one; a `Trainer` takes it as a plugin.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: Its content.
            path: The file; an address of remote storage is left to Lightning.
            storage_options: Must be None, as in Lightning.

        Raises:
            OSError: If it cannot be written; the old file is still there then.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # the latter from torch, for a full disk
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"The checkpoint {path} could not be saved: {cause}. What was there before is "
                "still there. Make room, or choose another folder by --checkpoint.dirpath."
            ) from error


@contextmanager
def no_larger_than(size: int, source: object) -> Iterator[None]:
    """Ends the making of a net that is much larger than the weights that it is made for.

    Else a few words in a file, such as a width, would take all of the machine's memory and time.

    Args:
        size: Number of the weights. Making a net may take twice as many, and a few millions.
        source: The file that they come from, for messages.

    Raises:
        ValueError: If the net is larger, as soon as it is.
    """
    left, thread = 2 * size + 2**24, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != thread:
            return
        left -= parameter.numel()
        if left < 0:
            raise TeamNetError(
                f"{source} names a net that is larger than the {size:,} weights that it holds."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def number_of_weights(weights: Mapping[str, Tensor]) -> int:
    """How many numbers there are in a state dict."""
    return sum(weight.numel() for weight in weights.values())

"""Lightning's checkpoints, written completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO

from teamnet_pl.atomic import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints atomically: after any failure, a file is the complete old or new one.

    Lightning's default writes to the temporary folder of the system and copies over the old file.
    The command line uses this class; a `Trainer` takes it as a plugin.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: The content.
            path: The file; an address of remote storage is left to Lightning.
            storage_options: Must be None, as in Lightning.

        Raises:
            OSError: If the file cannot be written; the old file is kept.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"The checkpoint {path} could not be saved: {cause}. The old file is kept. Make "
                "room, or choose another folder with --checkpoint.dirpath."
            ) from error

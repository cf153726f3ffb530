"""Predicted labels as a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from teamnet_pl.callbacks.folder import results_folder


class PredictionWriter(BasePredictionWriter):
    """Writes what `Team` predicts to ``predictions.csv`` beside the checkpoint.

    One line for each image: its index in the dataset, and the label that each member predicts.
    Each of several processes writes the images that it saw, to ``predictions-<rank>.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes the file."""
        folder = results_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        with open(folder / f"predictions{rank}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", *predictions[0]])
            # Both are lists of batches; indices have one more level, for several dataloaders.
            for batch, indices in zip(predictions, batch_indices[0], strict=True):
                labels = [own.argmax(dim=-1).tolist() for own in batch.values()]
                writer.writerows(zip(indices, *labels, strict=True))

"""Predicted labels as a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from teamnet_pl.callbacks.folder import results_folder, save_beside
from teamnet_pl.cooperation import Team
from teamnet_pl.places import short_path


class PredictionWriter(BasePredictionWriter):
    """Writes the predictions of a `Team` to ``predictions.csv`` beside the checkpoint.

    Earlier predictions that differ are kept: the name then gets a number.

    Each line holds the index of an image in the dataset, and for each member the name of the
    predicted class: its number if the names are not known, nothing if the prediction is not finite.
    With several processes, each writes the images that it saw to ``predictions-<rank>.csv``.
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
        classes = pl_module.run.get("classes") if isinstance(pl_module, Team) else None
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = StringIO()
        writer = csv.writer(file)
        writer.writerow(["index", *predictions[0]])
        # Both are lists of batches; indices have one more level, for several dataloaders.
        for batch, indices in zip(predictions, batch_indices[0], strict=True):
            # A process that has run out of images gets None in their place.
            images = [index for index in indices if index is not None]
            columns = [_named(probabilities, classes) for probabilities in batch.values()]
            writer.writerows(zip(images, *columns, strict=True))
        path = save_beside(folder / f"predictions{rank}.csv", file.getvalue())
        print(f"Saved as {short_path(path)}")


def _named(probabilities: Tensor, classes: Sequence[str] | None) -> list[str | int]:
    finite = probabilities.isfinite().all(dim=-1).tolist()
    labels = probabilities.argmax(dim=-1).tolist()
    return [
        (classes[label] if classes else label) if is_finite else ""
        for label, is_finite in zip(labels, finite, strict=True)
    ]

"""``teamnet predict --images``: predictions for files that nobody labelled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from teamnet_pl.data.folders import image_files
from teamnet_pl.deploy.runtime.image_files import (
    FilePrediction,
    FilePredictions,
    check_ending,
    save_predictions,
)
from teamnet_pl.deploy.runtime.predictor import Predictor, check_budget
from teamnet_pl.places import free_name, short_path


def predict_images(
    images: list[str],
    ckpt_path: str,
    out: str | None = None,
    teammate: str = "a",
    depth: str | None = None,
    budget_ms: float | None = None,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    device: str = "cpu",
    trust_import: bool = False,
) -> None:
    """Writes the class of each image in files or folders, with probabilities.

    The images are prepared as those of the test split. They may be of any size that this
    preparation brings to the input size of the net.

    Args:
        images: Files, folders (with the folders in them) or patterns such as ``'photos/*.jpg'``.
        ckpt_path: The checkpoint.
        out: File for the predictions: ``.csv``, or ``.jsonl`` for a JSON object per line. By
            default ``predictions.csv`` in the current folder, or the next free name like it.
        teammate: Name of the Teammate, such as ``a``.
        depth: Name of the depth, such as ``d2``; by default the deepest.
        budget_ms: Milliseconds that an image may take, reading it included, in the mean over its
            batch. The deepest depth that fits runs.
        batch_size: Number of images that run at once.
        on_error: Whether a file that cannot be read or does not fit is an error, or is left out
            and named at the end.
        device: The device to run on, such as ``cuda``.
        trust_import: Whether the checkpoint may name a backbone or a transform by import path,
            which runs code. Allow this only for a file that you trust as you trust code.

    Raises:
        FileNotFoundError: If there is no such file, folder or pattern.
        TeamNetError: If the file is not a checkpoint of a team or has no such Teammate or depth, an
            image cannot be read, or a number is not positive.
    """
    path = free_name(Path("predictions.csv")) if out is None else Path(out)
    check_ending(path)
    if budget_ms is not None:
        check_budget(budget_ms)
    files = image_files(images)
    sizes = (1,) if budget_ms is None else (1, batch_size)
    predictor = Predictor.from_checkpoint(
        ckpt_path, teammate, device=device, batch_sizes=sizes, trust_import=trust_import
    )
    predictions = FilePredictions(
        predictor, files, batch_size, depth, budget_ms, skip=on_error == "skip"
    )
    depths: Counter[str] = Counter()

    def counted() -> Iterator[FilePrediction]:
        for each in predictions:
            depths[each.depth] += 1
            yield each

    save_predictions(counted(), path)
    shares = ", ".join(f"{count} at {name}" for name, count in depths.items())
    print(f"{depths.total()} images: {shares}" if depths else "No image could be predicted.")
    for reason in predictions.skipped:
        print(f"Skipped: {reason}")
    print(f"Saved as {short_path(path)}")

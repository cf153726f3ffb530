"""Predictions for image files that nobody labelled."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from teamnet_pl.atomic import atomic_write
from teamnet_pl.deploy.runtime.predictor import NonFiniteError, Predictor
from teamnet_pl.errors import TeamNetError

MAX_PIXELS = 2**27
"""Largest number of pixels of an image: of a user's own files, more are allowed than of uploads."""


@dataclass(frozen=True)
class FilePrediction:
    """The prediction for one file.

    Attributes:
        image: The file.
        probabilities: The probability of each class, by the name of the class.
        depth: Name of the depth that ran.
    """

    image: str
    probabilities: dict[str, float]
    depth: str

    @property
    def name(self) -> str:
        """Name of the most probable class."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """Probability of this class."""
        return self.probabilities[self.name]


@dataclass
class FilePredictions:
    """Predicts files in batches, as they are asked for.

    Args:
        predictor: The net.
        files: The files.
        batch_size: Number of images that run at once.
        depth: Name of the depth; by default the deepest.
        budget_ms: Milliseconds that an image may take in the mean over its batch, reading it
            included: the deepest depth that fits runs.
        skip: Whether to leave out files that cannot be read or do not fit the net.

    Attributes:
        skipped: The reason for each file that was left out so far; it names the file.

    Raises:
        TeamNetError: If the batch size or the budget is not positive, there is no such depth, or a
            file cannot be read or does not fit and is not to be skipped.
    """

    predictor: Predictor
    files: Sequence[Path]
    batch_size: int = 32
    depth: str | None = None
    budget_ms: float | None = None
    skip: bool = False
    skipped: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise TeamNetError(f"batch_size must be at least 1, found {self.batch_size}.")
        self.predictor.depth_for(depth=self.depth)

    def __iter__(self) -> Iterator[FilePrediction]:
        """Yields the predictions in the order of the files."""
        for start in range(0, len(self.files), self.batch_size):
            yield from self._predict(self.files[start : start + self.batch_size])

    def _predict(self, files: Sequence[Path]) -> Iterator[FilePrediction]:
        budget = None if self.budget_ms is None else self.budget_ms * len(files)
        try:
            prediction = self.predictor.predict(
                list(files), depth=self.depth, budget_ms=budget, max_pixels=MAX_PIXELS
            )
        except NonFiniteError as error:
            raise TeamNetError(f"{error} It is among {files[0]} to {files[-1]}.") from error
        except (OSError, TeamNetError):
            readable = [file for file in files if self._is_readable(file)]
            if len(readable) == len(files):
                raise
            if readable:
                yield from self._predict(readable)
            return
        classes = self.predictor.classes or range(prediction.probabilities.shape[1])
        for file, row in zip(files, prediction.probabilities.tolist(), strict=True):
            probabilities = dict(zip(map(str, classes), row, strict=True))
            yield FilePrediction(str(file), probabilities, prediction.depth)

    def _is_readable(self, file: Path) -> bool:
        """Notes a file that is not."""
        try:
            self.predictor.preprocessing(file, MAX_PIXELS)
        except (OSError, TeamNetError) as error:
            reason = str(error) if str(file) in str(error) else f"{file}: {error}"
            if not self.skip:
                raise TeamNetError(
                    f"{reason} Such files can be left out (--on_error skip)."
                ) from error
            self.skipped.append(reason)
            return False
        return True


def _csv_line(values: Iterable[object]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def csv_lines(predictions: Iterable[FilePrediction]) -> Iterator[str]:
    """Yields the lines of a CSV file: image, class, probability, depth and all probabilities."""
    for index, each in enumerate(predictions):
        if index == 0:
            columns = (f"p({name})" for name in each.probabilities)
            yield _csv_line(["image", "class", "probability", "depth", *columns])
        values = (each.image, each.name, each.probability, each.depth)
        yield _csv_line([*values, *each.probabilities.values()])


def json_lines(predictions: Iterable[FilePrediction]) -> Iterator[str]:
    """Yields a line of JSON for each image."""
    for each in predictions:
        record = {
            "image": each.image,
            "class": each.name,
            "probability": each.probability,
            "depth": each.depth,
            "probabilities": each.probabilities,
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


LINES: dict[str, Callable[[Iterable[FilePrediction]], Iterator[str]]] = {
    ".csv": csv_lines,
    ".json": json_lines,
    ".jsonl": json_lines,
}
"""What the lines of a file are, by the ending of its name."""


def check_ending(path: Path) -> None:
    """Refuses a file for predictions whose ending does not tell its format.

    Raises:
        TeamNetError: If the ending is unknown.
    """
    if path.suffix.lower() not in LINES:
        raise TeamNetError(
            f"The format follows from the name's ending, {', '.join(LINES)}; found {path.name}."
        )


def save_predictions(predictions: Iterable[FilePrediction], path: Path) -> None:
    """Writes predictions, as CSV or as a JSON object per line, by the ending of the file's name.

    Args:
        predictions: The predictions; they may be made while they are written.
        path: The file. An old one is replaced when the new one is complete.

    Raises:
        TeamNetError: If the ending is unknown.
        OSError: If the file cannot be written.
    """
    check_ending(path)
    with atomic_write(path) as file:
        for line in LINES[path.suffix.lower()](predictions):
            file.write(line.encode())

"""The profile of a net on one machine: latency, memory, arithmetic and accuracy of each depth."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class ProfileRow:
    """One depth at one batch size.

    Attributes:
        depth: Name of the depth.
        blocks_per_stage: Number of skippable blocks kept in each stage.
        macs: Multiply-accumulates for one image.
        parameters: Number of parameters.
        batch_size: Number of images that ran at once.
        median_ms: Median latency of the batch in milliseconds, from images in the machine's memory
            to probabilities in the machine's memory.
        p95_ms: 95th percentile of the latency.
        peak_bytes: Peak memory of tensors besides weights and images.
        accuracy: Top-1 accuracy in an evaluation, as a share from 0 to 1; None if there was none.
    """

    depth: str
    blocks_per_stage: Sequence[int]
    macs: int
    parameters: int
    batch_size: int
    median_ms: float
    p95_ms: float
    peak_bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Profile:
    """The depths of one net on one machine.

    Attributes:
        device: Kind of the device, such as ``cpu``.
        machine: Description of the machine.
        threads: Number of threads that a run uses on the CPU.
        rows: A row for each batch size and depth, the deepest depth first.
        split: The split of the accuracies; None if there are none.
    """

    device: str
    machine: str
    threads: int
    rows: Sequence[ProfileRow]
    split: str | None = None

    @cached_property
    def _medians(self) -> dict[str, tuple[list[int], list[float]]]:
        """Batch sizes in ascending order and their medians, by depth."""
        medians_by_depth: dict[str, tuple[list[int], list[float]]] = {}
        for row in sorted(self.rows, key=lambda row: row.batch_size):
            sizes, medians = medians_by_depth.setdefault(row.depth, ([], []))
            sizes.append(row.batch_size)
            medians.append(row.median_ms)
        return medians_by_depth

    @property
    def depths(self) -> list[str]:
        """Names of the depths, the deepest first."""
        return list(dict.fromkeys(row.depth for row in self.rows))

    def expected_ms(self, depth: str, batch_size: int) -> float:
        """Returns the median latency of a depth for any batch size.

        Latencies between two profiled batch sizes are interpolated linearly. A batch smaller than
        the smallest profiled one takes as long as that one. Beyond the largest profiled batch the
        latency is proportional to the batch size.

        Args:
            depth: Name of the depth.
            batch_size: Number of images.

        Returns:
            Milliseconds.
        """
        sizes, medians = self._medians[depth]
        upper = bisect_left(sizes, batch_size)
        if upper == 0:
            return medians[0]
        if upper == len(sizes):
            return medians[-1] * batch_size / sizes[-1]
        share = (batch_size - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
        return medians[upper - 1] + share * (medians[upper] - medians[upper - 1])

    def with_accuracies(self, accuracy: Mapping[str, float], split: str | None) -> Profile:
        """Returns the profile with the accuracies of an evaluation.

        Args:
            accuracy: Accuracy by the depth's name.
            split: The split that was evaluated.
        """
        rows = [replace(row, accuracy=accuracy.get(row.depth)) for row in self.rows]
        return replace(self, split=split, rows=rows)

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        atomic_write_text(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If it is not a profile.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}. `teamnet profile` writes a profile.")
        try:
            values = json.loads(Path(path).read_text())
            rows = [ProfileRow(**row) for row in values.pop("rows")]
            for row in rows:
                _check(row)
            profile = cls(rows=rows, **values)
            texts = [profile.device, profile.machine, profile.split or ""]
            if not rows or not all(isinstance(text, str) for text in texts):
                raise TeamNetError(f"rows, device, machine or split is wrong, found {values}")
            return profile
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise TeamNetError(
                f"{path} is not a profile of `teamnet profile`: {error}. Profile the net again."
            ) from error


def _check(row: ProfileRow) -> None:
    """Checks the types and ranges of a row that comes from a file."""
    if not isinstance(row.depth, str):
        raise TeamNetError(f"depth must be a text, found {row.depth!r}")
    counts = [row.macs, row.parameters, row.peak_bytes, row.batch_size]
    if not isinstance(row.blocks_per_stage, list) or any(
        type(count) is not int or not 0 <= count < 2**63 for count in counts + row.blocks_per_stage
    ):
        raise TeamNetError(f"counts must be whole numbers of at least 0, found {row}")
    times = [row.median_ms, row.p95_ms]
    if any(type(ms) not in (int, float) or not 0 < ms < 1e12 for ms in times):
        raise TeamNetError(f"times must be positive numbers, found {times}")
    if row.batch_size < 1:
        raise TeamNetError(f"batch_size must be at least 1, found {row.batch_size}")
    if row.accuracy is not None and type(row.accuracy) not in (int, float):
        raise TeamNetError(f"accuracy must be a number, found {row.accuracy!r}")

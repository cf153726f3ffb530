"""What each depth takes on this machine: time, memory and arithmetic, beside its accuracy."""

from __future__ import annotations

import json
import platform
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.errors import TeamNetError

WARM_UP = 2
"""Runs of each depth and batch size that are not counted."""


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
        p95_ms: The latency's 95th percentile.
        peak_bytes: Memory for tensors beyond weights and images at the peak.
        accuracy: Share of the images whose label is predicted first, from an evaluation; None if
            there was none.
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
    """What the depths of one net take on one machine.

    Attributes:
        device: Kind of the device, such as ``cpu``.
        machine: The machine in words.
        threads: Threads that one run uses on the processor.
        rows: The deepest depth first, for each batch size.
        split: Split of the accuracies; None without.
    """

    device: str
    machine: str
    threads: int
    rows: Sequence[ProfileRow]
    split: str | None = None

    @cached_property
    def _medians(self) -> dict[str, tuple[list[int], list[float]]]:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in sorted(self.rows, key=lambda row: row.batch_size):
            sizes, medians = found.setdefault(row.depth, ([], []))
            sizes.append(row.batch_size)
            medians.append(row.median_ms)
        return found

    @property
    def depths(self) -> list[str]:
        """Names of the depths, the deepest first."""
        return list(dict.fromkeys(row.depth for row in self.rows))

    def expected_ms(self, depth: str, batch_size: int) -> float:
        """Median latency of a depth for any batch size.

        Between two profiled sizes it is on the line between theirs. A smaller batch than profiled
        takes as long as the smallest; a larger one as much longer than the largest as it is larger.

        Args:
            depth: Name of the depth.
            batch_size: Number of images.

        Returns:
            Milliseconds.
        """
        sizes, medians = self._medians[depth]
        at = bisect_left(sizes, batch_size)
        if at == 0:
            return medians[0]
        if at == len(sizes):
            return medians[-1] * batch_size / sizes[-1]
        share = (batch_size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return medians[at - 1] + share * (medians[at] - medians[at - 1])

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        atomic_write_text(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a profile.
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
                raise TeamNetError(f"rows, device, machine and split do not fit, found {values}")
            return profile
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise TeamNetError(
                f"{path} is not a profile of `teamnet profile`: {error}. Profile the net anew."
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


@torch.inference_mode()
def run_timed(net: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """Runs a net.

    Args:
        net: In evaluation mode, on any device.
        images: Shape ``(N, channels, height, width)``, in the machine's memory.

    Returns:
        Class probabilities in the machine's memory, float32 of shape ``(N, classes)``, and the
        milliseconds that it took to get them there.
    """
    begin = perf_counter()
    logits = net(images.to(next(net.parameters())))
    probabilities = logits.float().softmax(dim=-1).cpu()  # waits for the device
    return probabilities, 1000 * (perf_counter() - begin)


def profile_depths(
    net: ElasticNet,
    views: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 8),
    runs: int = 50,
) -> Profile:
    """Measures each depth of a net, in turn, so that what else the machine does hits all alike.

    Args:
        net: The net, on the device to measure.
        views: It at each depth, in evaluation mode, by the depth's name, the deepest first.
        batch_sizes: Numbers of images at once.
        runs: How often each depth and batch size is timed.

    Raises:
        ValueError: If there is no batch size, one is not positive, or runs is not.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise TeamNetError(f"batch_sizes must be 1 or more each, found {list(batch_sizes)}.")
    if runs < 1:
        raise TeamNetError(f"runs must be at least 1, found {runs}.")
    parameter = next(net.parameters())
    device = parameter.device
    costs = depth_costs(net, net.input_shape)
    rows = []
    for batch_size in sorted(set(batch_sizes)):
        images = example_images(nn.Module(), batch_size, net.input_shape)
        times: dict[str, list[float]] = {name: [] for name in views}
        for _ in range(WARM_UP + runs):
            for name, view in views.items():
                times[name].append(run_timed(view, images)[1])
        on_device = images.to(parameter)
        for name, view in views.items():
            counted = times[name][WARM_UP:]
            rows.append(
                ProfileRow(
                    depth=name,
                    blocks_per_stage=net.depth(name).per_stage,
                    macs=costs[name].macs,
                    parameters=costs[name].parameters,
                    batch_size=batch_size,
                    median_ms=float(np.median(counted)),
                    p95_ms=float(np.percentile(counted, 95)),
                    peak_bytes=peak_bytes(partial(view, on_device), device),
                )
            )
    return Profile(device.type, machine(device), torch.get_num_threads(), rows)


def machine(device: torch.device) -> str:
    """A device in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}"


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Memory for tensors that a function takes at its peak, beyond that of tensors it is given.

    Args:
        step: Makes tensors on the device.
        device: The processor or a GPU.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    live = _LiveBytes()
    with live:
        step()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of the tensors made within it: the processor's allocator keeps no peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):  # weights and images among them
            self._seen.add(tensor.untyped_storage())
        output = func(*args, **kwargs or {})
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def pareto_front(rows: Sequence[ProfileRow]) -> list[ProfileRow]:
    """The rows of one batch size to choose from: none is both as fast and as accurate as they are.

    Args:
        rows: With accuracies.

    Returns:
        The fastest first, each more accurate than those before.
    """
    front: list[ProfileRow] = []
    for row in sorted(rows, key=lambda row: (row.median_ms, -(row.accuracy or 0))):
        if not front or (row.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(row)
    return front


HEADER = "depth", "blocks", "MACs, M", "batch", "median, ms", "p95, ms", "peak, MiB", "accuracy"


def profile_lines(profile: Profile) -> list[tuple[str, ...]]:
    """Lays a profile out for a table with `HEADER`."""
    return [
        (
            row.depth,
            "-".join(map(str, row.blocks_per_stage)),
            f"{row.macs / 1e6:.3f}",
            str(row.batch_size),
            f"{row.median_ms:.2f}",
            f"{row.p95_ms:.2f}",
            f"{row.peak_bytes / 2**20:.2f}",
            "" if row.accuracy is None else f"{row.accuracy:.2%}",
        )
        for row in profile.rows
    ]


def profile_table(profile: Profile) -> Table:
    """Lays a profile out as a table to print with rich."""
    table = Table(*HEADER, title=f"{profile.machine}, threads: {profile.threads}")
    for line in profile_lines(profile):
        table.add_row(*line)
    return table


def draw_profile(profile: Profile) -> Figure:
    """Draws accuracy against latency for each batch size, the Pareto front as a line."""
    sizes = list(dict.fromkeys(row.batch_size for row in profile.rows))
    figure = Figure(figsize=(4.5 * len(sizes), 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        own = [row for row in profile.rows if row.batch_size == size and row.accuracy is not None]
        front = pareto_front(own)
        axes.plot(*_points(own), "o", color="0.6", label="dominated")
        axes.plot(*_points(front), "o-", label="Pareto front")
        for row in own:
            point = (row.median_ms, 100 * (row.accuracy or 0))
            axes.annotate(row.depth, point, (3, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel("median latency, ms")
        axes.set_title(f"batch of {size}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"top-1 accuracy on the {profile.split} split, %")
    panels[-1].legend()
    return figure


def _points(rows: Sequence[ProfileRow]) -> tuple[list[float], list[float]]:
    return [row.median_ms for row in rows], [100 * (row.accuracy or 0) for row in rows]


def with_accuracies(profile: Profile, accuracy: Mapping[str, float], split: str | None) -> Profile:
    """Adds what an evaluation found.

    Args:
        profile: Of a net.
        accuracy: By the name of the depth.
        split: What it was evaluated on.
    """
    rows = [replace(row, accuracy=accuracy.get(row.depth)) for row in profile.rows]
    return replace(profile, split=split, rows=rows)

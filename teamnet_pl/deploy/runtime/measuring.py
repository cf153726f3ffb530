"""Measures the latency and the peak memory of each depth on this machine."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teamnet_pl.deploy.runtime.profile import Profile, ProfileRow
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.errors import TeamNetError

WARM_UP = 2
"""Number of runs of each depth and batch size before those that count."""


@torch.inference_mode()
def run_timed(net: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """Runs a net and measures the latency.

    Args:
        net: A net in evaluation mode, on any device.
        images: Shape ``(N, channels, height, width)``, in the machine's memory.

    Returns:
        Class probabilities in the machine's memory, float32 of shape ``(N, classes)``, and the
        latency in milliseconds.
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
    """Measures each depth of a net.

    The depths run in turn, so that other work on the machine affects all of them alike.

    Args:
        net: The net, on the device to measure.
        views: A view of the net at each depth, in evaluation mode, by the depth's name, the deepest
            first.
        batch_sizes: Numbers of images that run at once.
        runs: Number of timed runs of each depth and batch size.

    Raises:
        TeamNetError: If there is no batch size, or a batch size or `runs` is not positive.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise TeamNetError(
            f"batch_sizes must be one or more positive numbers, found {list(batch_sizes)}."
        )
    if runs < 1:
        raise TeamNetError(f"runs must be at least 1, found {runs}.")
    parameter = next(net.parameters())
    device = parameter.device
    costs = depth_costs(net, net.input_shape)
    rows = []
    for batch_size in sorted(set(batch_sizes)):
        images = example_images(nn.Module(), batch_size, net.input_shape)
        latencies_ms = _latencies_ms(views, images, runs)
        on_device = images.to(parameter)
        rows += [
            ProfileRow(
                depth=name,
                blocks_per_stage=net.depth(name).per_stage,
                macs=costs[name].macs,
                parameters=costs[name].parameters,
                batch_size=batch_size,
                median_ms=float(np.median(latencies_ms[name])),
                p95_ms=float(np.percentile(latencies_ms[name], 95)),
                peak_bytes=peak_bytes(partial(view, on_device), device),
            )
            for name, view in views.items()
        ]
    return Profile(device.type, _describe(device), torch.get_num_threads(), rows)


def profile_teammate(net: Teammate, batch_sizes: Sequence[int] = (1, 8), runs: int = 50) -> Profile:
    """Measures each depth of a Teammate, and adds its accuracies if they are known.

    Args:
        net: The Teammate, on the device to measure.
        batch_sizes: Numbers of images that run at once.
        runs: Number of timed runs of each depth and batch size.

    Raises:
        TeamNetError: As in `profile_depths`.
    """
    views = {depth.name: net.view(depth) for depth in net.depths}
    profile = profile_depths(net, views, batch_sizes, runs)
    return profile.with_accuracies(net.accuracy, net.split) if net.accuracy else profile


def _latencies_ms(
    views: Mapping[str, nn.Module], images: Tensor, runs: int
) -> dict[str, list[float]]:
    """Times the views in turn."""
    latencies_ms: dict[str, list[float]] = {name: [] for name in views}
    for _ in range(WARM_UP + runs):
        for name, view in views.items():
            latencies_ms[name].append(run_timed(view, images)[1])
    return {name: values[WARM_UP:] for name, values in latencies_ms.items()}


def _describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}"


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Measures the peak memory of the tensors that a function makes.

    Args:
        step: The function. Tensors that it is given do not count.
        device: The device of the tensors, the CPU or a GPU.
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
    """Counts the memory of tensors made within it, as the CPU's allocator records no peak."""

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

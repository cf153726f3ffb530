"""Finding the layers that couple the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from teamnet_pl.elastic.discovery.probing import hooks, run
from teamnet_pl.errors import TeamNetError


def perturb_zero_weights(net: nn.Module) -> None:
    """Overwrites weights near zero, which hide the layers before them, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and parameter.abs().max() <= 1e-2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def find_coupling(probe: nn.Module, images: Tensor, blocks: Sequence[str]) -> list[str]:
    """Finds the layers whose output for one image depends on the other images of the batch.

    Batch norms are known to couple samples. The others are found by running an image beside two
    different ones; of modules in modules, the innermost count.

    Args:
        probe: The net, in training mode; its weights may change.
        images: More than two, shape ``(N, channels, height, width)``.
        blocks: Names of the skippable blocks.

    Returns:
        Names of the layers.

    Raises:
        TeamNetError: If samples are coupled around a block, or the batch is not the first axis
            there.
    """
    coupling = _batch_norms(probe)
    perturb_zero_weights(probe)
    more = _record(probe, images, coupling)
    comparisons = _compare_neighbors(probe, images, more, coupling)
    while (call := _first_coupling_call(comparisons, coupling)) is not None:
        _check_runs_per_stream(call, probe, blocks)
        coupling.append(call.name)
        comparisons = _compare_neighbors(probe, images, more, coupling)
    _check_batch_comes_first(comparisons, blocks)
    return [name for name in coupling if not any(name.startswith(f"{c}.") for c in coupling)]


def _batch_norms(probe: nn.Module) -> list[str]:
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, module in probe.named_modules() if isinstance(module, kind)]


@dataclass
class _Call:
    """A call of a module. Its tensors are those of its inputs, then those of its outputs.

    Attributes:
        name: Name of the module.
        num_inputs: How many of the tensors are inputs.
        maps_one_tensor: Whether it maps one tensor to another.
        sizes: Length of each tensor.
        sums: Of the first half of each tensor, which belongs to the first of two images.
        output: The first half of the output, of a layer that is known to couple samples.
    """

    name: str
    num_inputs: int
    maps_one_tensor: bool
    sizes: list[int]
    sums: list[Tensor]
    output: Tensor | None


@dataclass
class _Comparison:
    """A call for an image beside one other image, compared with that beside another one.

    Attributes:
        call: The call.
        grows: For each tensor, whether its first axis grows with the batch.
        is_same: For each tensor, whether its values for the image stay the same.
    """

    call: _Call
    grows: list[bool]
    is_same: list[bool]

    @property
    def couples(self) -> bool:
        """Whether samples arrive independent of each other and leave coupled."""
        num_inputs = self.call.num_inputs
        return all(self.is_same[:num_inputs]) and not all(self.is_same[num_inputs:])

    @property
    def batch_comes_first(self) -> bool:
        """Whether the first axis of the output is the batch."""
        output = self.call.num_inputs
        return self.grows[output] and self.is_same[output]


def _compare_neighbors(
    probe: nn.Module, images: Tensor, more: list[_Call], coupling: Sequence[str]
) -> list[_Comparison]:
    """Compares the calls for an image beside two different others.

    Args:
        probe: The net.
        images: The first one is looked at.
        more: The calls for more than two images.
        coupling: Names of the layers that are known to couple samples, which do not count.
    """
    image, other = images[0], images[1]
    before = _record(probe, torch.stack([image, other]), coupling)
    after = _record(probe, torch.stack([image, 2 * other + 1]), coupling, replayed=before)
    comparisons = []
    for larger, call, changed in zip(more, before, after, strict=True):
        grows = [size != less for size, less in zip(larger.sizes, call.sizes, strict=True)]
        is_same = [
            not grown or _close(a, b)
            for grown, a, b in zip(grows, call.sums, changed.sums, strict=True)
        ]
        comparisons.append(_Comparison(call, grows, is_same))
    return comparisons


def _record(
    probe: nn.Module, images: Tensor, coupling: Sequence[str], replayed: Sequence[_Call] = ()
) -> list[_Call]:
    """Runs the probe and lists its calls in the order in which they ended.

    Where another run is replayed, the layers that are known to couple samples output for the first
    image what they output in that run.
    """
    calls: list[_Call] = []

    def end(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = replayed[len(calls)].output if replayed else None
        if first is not None:
            output[: len(first)] = first
        inputs, outputs = _tensors((args, kwargs)), _tensors(output)
        halves = [tensor[: len(tensor) // 2] for tensor in (*inputs, *outputs)]
        calls.append(
            _Call(
                name=name,
                num_inputs=len(inputs),
                maps_one_tensor=(
                    not kwargs and len(args) == len(inputs) == 1 and isinstance(output, Tensor)
                ),
                sizes=[len(tensor) for tensor in (*inputs, *outputs)],
                sums=[_sums(half) for half in halves],
                output=halves[-1].clone() if name in coupling else None,
            )
        )

    with hooks(probe, after=end):
        run(probe, images)
    return calls


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]


def _sums(values: Tensor) -> Tensor:
    values = torch.view_as_real(values) if values.is_complex() else values.double()
    return torch.stack([values.sum(), values.abs().sum()])


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(
        a, b, rtol=0, atol=1e-5 * float(a[1].nan_to_num()) + 1e-12, equal_nan=True
    )


def _first_coupling_call(
    comparisons: Sequence[_Comparison], coupling: Sequence[str]
) -> _Call | None:
    """The first call that couples samples, of a layer that is not known to."""
    for comparison in comparisons:
        if comparison.call.name not in coupling and comparison.couples:
            return comparison.call
    return None


def _check_runs_per_stream(call: _Call, probe: nn.Module, blocks: Sequence[str]) -> None:
    """Refuses a layer that cannot run for each stream alone."""
    name = call.name
    is_around_blocks = not name or any(f"{block}.".startswith(f"{name}.") for block in blocks)
    if is_around_blocks or not call.maps_one_tensor:
        kind = type(probe.get_submodule(name)).__name__
        raise TeamNetError(
            f"{name or 'The backbone'} ({kind}) couples the samples of a batch, so depths cannot "
            "share a forward pass. Only a layer that maps one tensor to another, as batch norm "
            "does, can run for each depth alone."
        )


def _check_batch_comes_first(comparisons: Sequence[_Comparison], blocks: Sequence[str]) -> None:
    """Refuses blocks whose first axis is not the batch, since the streams lie along it."""
    for comparison in comparisons:
        name = comparison.call.name
        if name in blocks and not comparison.batch_comes_first:
            raise TeamNetError(
                f"The first axis of the output of {name} is not the batch, so depths cannot share "
                "a forward pass. Use a batch-first net."
            )

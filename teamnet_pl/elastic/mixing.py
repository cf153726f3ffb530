"""Finding the layers that mix the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from teamnet_pl.elastic.probing import hooks, run
from teamnet_pl.errors import TeamNetError


def show_weights(net: nn.Module) -> None:
    """Fills weights near zero, behind which nothing would show, with random numbers, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and parameter.abs().max() <= 1e-2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def find_mixing(probe: nn.Module, images: Tensor, blocks: Sequence[str]) -> list[str]:
    """Finds the layers that mix samples: what becomes of an image beside two different others?

    Batch norms are known to. Of others the innermost modules are found.

    Args:
        probe: The net, in training mode; its weights may change.
        images: More than two, shape ``(N, channels, height, width)``.
        blocks: Names of the skippable blocks.

    Returns:
        Names of the layers.

    Raises:
        ValueError: If samples are mixed around a block, or the batch is not the first axis there.
    """
    norms = (nn.modules.batchnorm._BatchNorm,)
    mixing = [name for name, module in probe.named_modules() if isinstance(module, norms)]
    show_weights(probe)
    sizes = [call.sizes for call in _run(probe, images, mixing)]
    first, second = images[0], images[1]
    before = _run(probe, torch.stack([first, second]), mixing)
    while True:
        after = _run(probe, torch.stack([first, 2 * second + 1]), mixing, before)
        wrong: list[str] = []
        for size, a, b in zip(sizes, before, after, strict=True):
            grows = [more != less for more, less in zip(size, a.sizes, strict=True)]
            same = [not g or _close(x, y) for g, x, y in zip(grows, a.sums, b.sums, strict=True)]
            if a.name in blocks and not (grows[a.inputs] and same[a.inputs]):
                wrong.append(a.name)
            if a.name not in mixing and all(same[: a.inputs]) and not all(same[a.inputs :]):
                break  # samples come apart and go out mixed
        else:
            if wrong:
                raise TeamNetError(
                    f"The first axis of what {wrong[0]} returns is not the batch, so depths cannot "
                    "share a forward pass. Use a batch-first net."
                )
            return [name for name in mixing if not any(name.startswith(f"{m}.") for m in mixing)]
        around_blocks = not a.name or any(f"{name}.".startswith(f"{a.name}.") for name in blocks)
        if around_blocks or not a.single:
            kind = type(probe.get_submodule(a.name)).__name__
            raise TeamNetError(
                f"{a.name or 'The backbone'} ({kind}) mixes the samples of a batch, so depths "
                "cannot share a forward pass. Only a layer that maps one tensor to another, as "
                "batch norm does, can run for each depth alone."
            )
        mixing.append(a.name)
        before = _run(probe, torch.stack([first, second]), mixing)


@dataclass
class _Call:
    """A call of a module.

    Attributes:
        name: Name of the module.
        inputs: How many of the tensors are inputs; the others are outputs.
        single: Whether it maps one tensor to another.
        sizes: Length of each tensor.
        sums: Of the first half of each tensor, which is the first of two images.
        output: The first half of the output, of a layer that is known to mix.
    """

    name: str
    inputs: int
    single: bool
    sizes: list[int]
    sums: list[Tensor]
    output: Tensor | None


def _run(
    probe: nn.Module, images: Tensor, mixing: Sequence[str], before: Sequence[_Call] = ()
) -> list[_Call]:
    """Runs the probe and lists its calls in the order in which they ended.

    Where another run is given, the layers that mix put out for the first image what they did there.
    """
    calls: list[_Call] = []

    def end(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = before[len(calls)].output if before else None
        if first is not None:
            output[: len(first)] = first
        inputs, outputs = _tensors((args, kwargs)), _tensors(output)
        halves = [leaf[: len(leaf) // 2] for leaf in (*inputs, *outputs)]
        calls.append(
            _Call(
                name,
                len(inputs),
                not kwargs and len(args) == len(inputs) == 1 and isinstance(output, Tensor),
                [len(leaf) for leaf in (*inputs, *outputs)],
                [_sums(half) for half in halves],
                halves[-1].clone() if name in mixing else None,
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

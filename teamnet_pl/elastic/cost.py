"""What each depth costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teamnet_pl.elastic.blocks import Block
from teamnet_pl.elastic.depths import Depth
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.net import ElasticNet


@dataclass(frozen=True)
class Cost:
    """Cost of a net or of one of its depths.

    Attributes:
        macs: Multiply-accumulates for one image: those of convolutions, matrix products and
            attention, as `torch.utils.flop_counter` counts them.
        parameters: Number of parameters.
    """

    macs: int
    parameters: int


def cost(net: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Measures the cost of a net for one image.

    Args:
        net: Takes images ``(1, *input_shape)``. An elastic net is measured at the depth it is at.
        input_shape: Shape of one image, ``(channels, height, width)``.
    """
    return Cost(_macs(net, input_shape)[""], sum(p.numel() for p in net.parameters()))


def depth_costs(net: ElasticNet, input_shape: Sequence[int]) -> dict[str, Cost]:
    """Measures the cost of each depth of a net, without extracting it.

    Args:
        net: The net.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The cost by the depth's name, the deepest first.
    """
    with net.at(net.depths[0]):
        costs = costs_without_blocks(net.backbone, net.blocks, net.depths, input_shape)
    return {depth.name: each for depth, each in zip(net.depths, costs, strict=True)}


def costs_without_blocks(
    backbone: nn.Module,
    blocks: Sequence[Block],
    depths: Iterable[Depth],
    input_shape: Sequence[int],
) -> list[Cost]:
    """Measures what a backbone would cost at each of some depths, in one forward pass.

    Args:
        backbone: The whole net.
        blocks: Its skippable blocks, see `trace`.
        depths: Which of them each depth keeps.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The cost of each depth.
    """
    macs = _macs(backbone, input_shape)
    homes: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        homes[parameter].append(name)
    costs = []
    for depth in depths:
        names = [block.name for block, kept in zip(blocks, depth.kept, strict=True) if not kept]
        skipped = tuple(f"{name}." for name in names)
        parameters = sum(
            parameter.numel()
            for parameter, own in homes.items()
            if not all(name.startswith(skipped) for name in own)
        )
        costs.append(Cost(macs[""] - sum(macs[name] for name in names), parameters))
    return costs


def _macs(net: nn.Module, input_shape: Sequence[int]) -> Counter[str]:
    """Multiply-accumulates of a net, under the name "", and of each of its modules."""
    image = example_images(net, 1, input_shape)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The counter does not know fused attention.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with evaluation(net), sdpa_kernel(SDPBackend.MATH), counter:
            net(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    # A multiply-accumulate is two operations. Names begin with that of the net's class.
    return Counter(
        {
            "" if name == "Global" else name.partition(".")[2]: sum(own.values()) // 2
            for name, own in counter.get_flop_counts().items()
            if name == "Global" or "." in name
        }
    )


def cost_table(nets: Iterable[ElasticNet], input_shape: Sequence[int]) -> Table:
    """Lays the cost of each depth out as a table to print with rich."""
    table = Table("depth", "blocks per stage", "MACs", "parameters")
    for net in nets:
        for depth, each in zip(net.depths, depth_costs(net, input_shape).values(), strict=True):
            stages = "-".join(map(str, depth.per_stage))
            table.add_row(depth.name, stages, f"{each.macs:,}", f"{each.parameters:,}")
    return table

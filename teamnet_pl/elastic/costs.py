"""The cost of each depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teamnet_pl.elastic.adaptive import AdaptiveNet
from teamnet_pl.elastic.depths import Depth, format_stages
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.net import ElasticNet
from teamnet_pl.elastic.plan import Block

if TYPE_CHECKING:
    from rich.table import Table


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
        net: Takes images ``(1, *input_shape)``. An elastic net is measured at its current depth.
        input_shape: Shape of one image, ``(channels, height, width)``.
    """
    return Cost(_macs(net, input_shape)[""], sum(p.numel() for p in net.parameters()))


def depth_costs(net: AdaptiveNet, input_shape: Sequence[int]) -> dict[str, Cost]:
    """Measures the cost of each depth of a net: of an elastic net without extracting it.

    Args:
        net: The net.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The cost by the depth's name, the deepest first.
    """
    if not isinstance(net, ElasticNet):
        return {depth.name: cost(net.extract(depth), input_shape) for depth in net.depths}
    with net.at(net.depths[0]):
        costs = costs_without_blocks(net.backbone, net.blocks, net.depths, input_shape)
    return {depth.name: cost for depth, cost in zip(net.depths, costs, strict=True)}


def costs_without_blocks(
    backbone: nn.Module,
    blocks: Sequence[Block],
    depths: Iterable[Depth],
    input_shape: Sequence[int],
) -> list[Cost]:
    """Measures the cost of a backbone at each of some depths, in one forward pass.

    Args:
        backbone: The whole net.
        blocks: Its skippable blocks, see `trace_backbone`.
        depths: The depths, each with the blocks that it keeps.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The cost of each depth.
    """
    macs = _macs(backbone, input_shape)
    names_of: dict[nn.Parameter, list[str]] = defaultdict(list)  # several, if weights are tied
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names_of[parameter].append(name)
    costs = []
    for depth in depths:
        skipped = [block.name for block, kept in zip(blocks, depth.kept, strict=True) if not kept]
        beginnings = tuple(f"{name}." for name in skipped)
        parameters = sum(
            parameter.numel()
            for parameter, names in names_of.items()
            if not all(name.startswith(beginnings) for name in names)
        )
        costs.append(Cost(macs[""] - sum(macs[name] for name in skipped), parameters))
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
            "" if name == "Global" else name.partition(".")[2]: sum(operations.values()) // 2
            for name, operations in counter.get_flop_counts().items()
            if name == "Global" or "." in name
        }
    )


def cost_table(nets: Iterable[ElasticNet], input_shape: Sequence[int]) -> Table:
    """Lays out the cost of each depth as a table to print with rich."""
    from rich.table import Table

    table = Table("depth", "blocks per stage", "MACs", "parameters")
    for net in nets:
        for depth, cost in zip(net.depths, depth_costs(net, input_shape).values(), strict=True):
            stages = format_stages(depth.per_stage)
            table.add_row(depth.name, stages, f"{cost.macs:,}", f"{cost.parameters:,}")
    return table

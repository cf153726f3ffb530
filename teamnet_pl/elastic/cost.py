"""What each depth costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    # A multiply-accumulate is two operations.
    return Cost(counter.get_total_flops() // 2, sum(p.numel() for p in net.parameters()))


def depth_costs(net: ElasticNet, input_shape: Sequence[int]) -> dict[str, Cost]:
    """Measures the cost of each depth of a net, without extracting it.

    Args:
        net: The net.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The cost by the depth's name, the deepest first.
    """
    costs = {}
    for depth in net.depths:
        skipped = sum(
            parameter.numel()
            for block, kept in zip(net.blocks, depth.kept, strict=True)
            if not kept
            for parameter in net.backbone.get_submodule(block.name).parameters()
        )
        with net.at(depth):
            whole = cost(net.backbone, input_shape)
        costs[depth.name] = Cost(whole.macs, whole.parameters - skipped)
    return costs


def cost_table(nets: Iterable[ElasticNet], input_shape: Sequence[int]) -> Table:
    """Lays the cost of each depth out as a table to print with rich."""
    table = Table("depth", "blocks per stage", "MACs", "parameters")
    for net in nets:
        for depth, each in zip(net.depths, depth_costs(net, input_shape).values(), strict=True):
            stages = "-".join(map(str, depth.per_stage))
            table.add_row(depth.name, stages, f"{each.macs:,}", f"{each.parameters:,}")
    return table

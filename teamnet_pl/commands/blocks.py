"""``teamnet blocks``: the skippable blocks of a backbone, and the cost of each depth."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch import nn

from teamnet_pl.backbones import BackboneConfig, create_backbone, default_input_shape
from teamnet_pl.elastic import (
    DepthPolicy,
    DepthSpec,
    Trace,
    costs_without_blocks,
    derive_depths,
    trace_backbone,
)
from teamnet_pl.elastic.depths import format_stages


def show_blocks(
    backbone: str,
    options: dict[str, Any] | None = None,
    num_classes: int = 1000,
    input_shape: list[int] | None = None,
    blocks: list[str] | None = None,
    depths: DepthSpec | None = None,
    interleaved: bool = False,
    json: bool = False,
) -> None:
    """Prints a backbone's skippable blocks and the cost of each policy's depths.

    Args:
        backbone: Name of the backbone, such as ``timm/convnext_atto``.
        options: Further arguments of the backbone.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image; by default those that the backbone was
            designed for.
        blocks: Names of the skippable blocks, with wildcards, instead of those found.
        depths: How many depths, or how many blocks each keeps, or how many in each stage; by
            default four depths, or all if there are fewer.
        interleaved: Whether to show the depths that lie between those of a net that is not
            interleaved.
        json: Whether to print one JSON object instead of tables.

    Raises:
        TeamNetError: If there is no such backbone, it cannot be made elastic, or it has no such
            depths.
    """
    config = BackboneConfig(backbone, options or {})
    shape = tuple(input_shape or default_input_shape(config))
    net = create_backbone(config, num_classes, in_channels=shape[0])
    trace = trace_backbone(net, shape, blocks)
    if depths is None:
        depths = min(4, len(trace.blocks) + 1)
    rows: dict[str, list[dict[str, Any]]] = {
        policy: _rows(net, shape, trace, depths, policy, interleaved)
        for policy in get_args(DepthPolicy)
    }
    if json:
        record = {
            "backbone": backbone,
            "input_shape": shape,
            "num_classes": num_classes,
            "blocks": [block.name for block in trace.blocks],
            "stages": trace.stages,
            "depths": rows,
        }
        print(json_format.dumps(record, indent=1))
    else:
        size = "x".join(map(str, shape))
        _print_tables(f"{backbone}, images of {size}", trace, rows)


def _rows(
    net: nn.Module,
    shape: Sequence[int],
    trace: Trace,
    depths: DepthSpec,
    policy: DepthPolicy,
    interleaved: bool,
) -> list[dict[str, Any]]:
    """The depths of one policy and their costs."""
    derived = derive_depths(trace.stages, depths, policy, interleaved)
    costs = costs_without_blocks(net, trace.blocks, derived, shape)
    return [
        {
            "name": depth.name,
            "per_stage": depth.per_stage,
            "kept": [b.name for b, kept in zip(trace.blocks, depth.kept, strict=True) if kept],
            **asdict(cost),
        }
        for depth, cost in zip(derived, costs, strict=True)
    ]


def _print_tables(title: str, trace: Trace, rows: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("stage", "skippable blocks", title=title)
    for stage in range(len(trace.stages)):
        names = ", ".join(block.name for block in trace.blocks if block.stage == stage)
        table.add_row(str(stage), names)
    console.print(table)
    table = Table("policy", "depth", "blocks per stage", "MACs", "parameters")
    for policy, depths in rows.items():
        for row in depths:
            per_stage = format_stages(row["per_stage"])
            numbers = (f"{row[name]:,}" for name in ("macs", "parameters"))
            table.add_row(policy, row["name"], per_stage, *numbers)
        table.add_section()
    console.print(table)

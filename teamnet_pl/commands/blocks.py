"""``teamnet blocks``: which blocks of a backbone can be skipped, and what each depth costs."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from teamnet_pl.backbones import BackboneConfig, create_backbone, own_input_shape
from teamnet_pl.elastic import DepthPolicy, DepthSpec, costs_without_blocks, derive_depths
from teamnet_pl.elastic.blocks import trace


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
    """Prints a backbone's skippable blocks and what each policy's depths cost.

    Args:
        backbone: Name of the backbone, such as ``timm/convnext_atto``.
        options: Further arguments of the backbone.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image; by default the backbone's own.
        blocks: Names of the skippable blocks, with wildcards, instead of those found.
        depths: How many depths, or how many blocks each keeps, or how many in each stage; by
            default four, if there are as many.
        interleaved: Whether to show the depths between those of a net that is not.
        json: Whether to print one JSON object instead of tables.

    Raises:
        ValueError: If there is no such backbone, it cannot be made elastic, or it has no such
            depths.
    """
    config = BackboneConfig(backbone, options or {})
    shape = tuple(input_shape or own_input_shape(config))
    net = create_backbone(config, num_classes, in_channels=shape[0])
    found = trace(net, shape, blocks)
    if depths is None:
        depths = min(4, len(found.blocks) + 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for policy in get_args(DepthPolicy):
        derived = derive_depths(found.stages, depths, policy, interleaved)
        costs = costs_without_blocks(net, found.blocks, derived, shape)
        rows[policy] = [
            {
                "name": depth.name,
                "per_stage": depth.per_stage,
                "kept": [b.name for b, kept in zip(found.blocks, depth.kept, strict=True) if kept],
                **asdict(each),
            }
            for depth, each in zip(derived, costs, strict=True)
        ]
    if json:
        record = {
            "backbone": backbone,
            "input_shape": shape,
            "num_classes": num_classes,
            "blocks": [block.name for block in found.blocks],
            "stages": found.stages,
            "depths": rows,
        }
        print(json_format.dumps(record, indent=1))
        return
    size = "x".join(map(str, shape))
    console = Console()
    table = Table("stage", "skippable blocks", title=f"{backbone}, images of {size}")
    for stage in range(len(found.stages)):
        names = ", ".join(block.name for block in found.blocks if block.stage == stage)
        table.add_row(str(stage), names)
    console.print(table)
    table = Table("policy", "depth", "blocks per stage", "MACs", "parameters")
    for policy, own in rows.items():
        for row in own:
            per_stage = "-".join(map(str, row["per_stage"]))
            numbers = (f"{row[name]:,}" for name in ("macs", "parameters"))
            table.add_row(policy, row["name"], per_stage, *numbers)
        table.add_section()
    console.print(table)

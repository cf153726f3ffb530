"""One depth as a `torch.export` or ExecuTorch program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from teamnet_pl.deploy.export.weights import plain_net
from teamnet_pl.elastic import DepthLike, ElasticNet
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require


def exported_program(
    net: ElasticNet, depth: DepthLike, batch_size: int | None = None
) -> ExportedProgram:
    """Exports one depth with `torch.export`.

    Args:
        net: The net.
        depth: One of its depths.
        batch_size: Number of images that the program takes; by default any number.

    Returns:
        A program that maps images ``(N, *net.input_shape)`` to logits ``(N, classes)``.

    Raises:
        TeamNetError: If the net has no such depth, cannot run without the skipped blocks, or cannot
            be exported.
    """
    plain = plain_net(net, depth)
    # Two examples: from one, torch.export would conclude that a batch always has one image.
    images = example_images(plain, batch_size or 2, net.input_shape)
    shapes = None if batch_size else ({0: Dim("batch")},)
    try:
        return torch.export.export(plain, (images,), dynamic_shapes=shapes)
    except Exception as error:  # the tracer raises errors of many kinds
        size = batch_size or "any number of"
        raise TeamNetError(
            f"torch.export cannot export {type(plain).__name__} at {depth} for {size} images: "
            f"{error}"
        ) from error


def save_program(net: ElasticNet, depth: DepthLike, path: str | Path) -> None:
    """Saves one depth as a `torch.export` program, which `torch.export.load` loads.

    Args:
        net: The net.
        depth: One of its depths.
        path: The ``.pt2`` file.

    Raises:
        TeamNetError: As in `exported_program`.
    """
    torch.export.save(exported_program(net, depth), path)


def save_executorch(net: ElasticNet, depth: DepthLike, path: str | Path) -> None:
    """Saves one depth as an ExecuTorch program for the processors of phones and small boards.

    The program takes one image at a time and runs on XNNPACK.

    Args:
        net: The net.
        depth: One of its depths.
        path: The ``.pte`` file.

    Raises:
        TeamNetError: As in `exported_program`.
        ModuleNotFoundError: If the extra ``executorch`` is not installed.
    """
    exir = require("executorch.exir", "executorch")
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    program = exir.to_edge_transform_and_lower(
        exported_program(net, depth, batch_size=1), partitioner=[xnnpack.XnnpackPartitioner()]
    )
    Path(path).write_bytes(program.to_executorch().buffer)

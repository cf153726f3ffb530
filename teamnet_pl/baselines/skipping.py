"""Skipping blocks of a plain net."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from teamnet_pl.elastic import Block
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.extraction import without_blocks
from teamnet_pl.elastic.plan import pass_through


@contextmanager
def skipping(backbone: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Skips some blocks of a net within a ``with`` block.

    Args:
        backbone: The net.
        blocks: The blocks to skip.
    """
    modules = [backbone.get_submodule(block.name) for block in blocks]
    before = [vars(module).get("forward") for module in modules]  # set on the instance
    for module, block in zip(modules, blocks, strict=True):
        module.forward = partial(_pass_through, block.passthrough)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _pass_through(passthrough: int, *args: Any, **kwargs: Any) -> Any:
    return pass_through(passthrough, args)


def copy_without(
    backbone: nn.Module, blocks: Sequence[Block], input_shape: Sequence[int]
) -> nn.Module:
    """Copies a net without some of its blocks.

    Args:
        backbone: The net.
        blocks: The blocks to leave out.
        input_shape: Shape of one image, ``(channels, height, width)``, to try the copy on.

    Raises:
        TeamNetError: If the net cannot do without the blocks.
    """
    images = example_images(backbone, 2, input_shape)
    with evaluation(backbone), skipping(backbone, blocks):
        logits = backbone(images)
    names = [block.name for block in blocks]
    return without_blocks(copy.deepcopy(backbone), names, images, logits)

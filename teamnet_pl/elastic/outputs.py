"""The outputs of a net: a tensor, or tensors in tuples, dictionaries and the like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map


def has_batch(outputs: Any, rows: int) -> bool:
    """Tells whether outputs have a tensor whose first axis is a batch of a size."""
    return any(_is_batch(leaf, rows) for leaf in tree_leaves(outputs))


def with_depth_axis(outputs: Any, depths: int, rows: int) -> Any:
    """Gives each tensor with a batch axis an axis of depths before it.

    Args:
        outputs: Of several depths, packed along the batch axis.
        depths: Their number.
        rows: Number of images.

    Returns:
        The same structure; tensors are of shape ``(depths, rows, ...)``. Other values are as they
        were.

    Examples:
        >>> outputs = with_depth_axis({"out": torch.zeros(6, 5, 8, 8), "aux": None}, 2, 3)
        >>> outputs["out"].shape, outputs["aux"]
        (torch.Size([2, 3, 5, 8, 8]), None)
    """
    return tree_map(
        lambda leaf: leaf.unflatten(0, (depths, rows)) if _is_batch(leaf, depths * rows) else leaf,
        outputs,
    )


def at_depth(outputs: Any, index: int, depths: int, rows: int) -> Any:
    """Takes the outputs of one depth out of packed ones.

    Args:
        outputs: Of several depths, packed along the batch axis.
        index: Index of the depth among them.
        depths: Their number.
        rows: Number of images.
    """
    return tree_map(
        lambda leaf: leaf.chunk(depths)[index] if _is_batch(leaf, depths * rows) else leaf, outputs
    )


def _is_batch(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def difference(outputs: Any, expected: Any) -> float:
    """Measures how much outputs differ from others, relative to the largest value of each tensor.

    Args:
        outputs: The outputs.
        expected: The right ones.

    Returns:
        The largest difference of a value, over the largest magnitude in its tensor; infinite if the
        structures, shapes or other values differ.
    """
    leaves, tree = tree_flatten(outputs)
    others, expected_tree = tree_flatten(expected)
    if tree != expected_tree:
        return float("inf")
    return max(map(_leaf_difference, leaves, others), default=0.0)


def _leaf_difference(value: Any, expected: Any) -> float:
    if not (isinstance(value, Tensor) and isinstance(expected, Tensor)):
        return 0.0 if type(value) is type(expected) and value == expected else float("inf")
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    if not value.is_floating_point() and not value.is_complex():
        return 0.0 if torch.equal(value, expected) else float("inf")
    if not torch.equal(value.isnan(), expected.isnan()):
        return float("inf")
    if not value.numel():
        return 0.0
    largest = float(expected.abs().nan_to_num().max())
    error = float((value - expected).abs().nan_to_num().max())
    return error / largest if largest else error

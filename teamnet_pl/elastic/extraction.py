"""Removing blocks from a plain net."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from teamnet_pl.elastic.evaluation import evaluation
from teamnet_pl.elastic.outputs import difference
from teamnet_pl.errors import TeamNetError


def drop_block(net: nn.Module, name: str) -> None:
    """Removes one block from a net, in place, as if the net had been built without it.

    In a `torch.nn.Sequential` or `torch.nn.ModuleList` the blocks behind it move up by one number,
    so the names are those of a shallower net. In any other parent an identity replaces it.

    Args:
        net: The net.
        name: Name of the block in it, such as ``layer3.1``.

    Raises:
        AttributeError: If there is no such block.
    """
    net.get_submodule(name)
    parent_name, _, key = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    if not isinstance(parent, nn.Sequential | nn.ModuleList):
        setattr(parent, key, nn.Identity())
        return
    keys = list(parent._modules)
    modules = [module for other, module in parent._modules.items() if other != key]
    numbered = len({re.sub(r"\d+$", "", other) for other in keys}) == 1
    names = keys[:-1] if numbered else [other for other in keys if other != key]
    parent._modules.clear()
    parent._modules.update(zip(names, modules, strict=True))


def without_blocks(
    net: nn.Module, names: Sequence[str], images: Tensor, expected: Any
) -> nn.Module:
    """Copies a net without some of its blocks; the copy has the weights of the net itself.

    Where the net relies on the positions of its blocks, identities replace them.

    Args:
        net: The net.
        names: Names of the blocks, in the order in which they run.
        images: A batch to try the copy on.
        expected: The right outputs for that batch without those blocks, in evaluation mode.

    Returns:
        The copy.

    Raises:
        TeamNetError: If the net cannot do without the blocks.
    """
    problem = "its outputs differ from those of the elastic net"
    weights = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    for moves_up in (True, False):
        plain = copy.deepcopy(net, dict(weights))
        for name in reversed(names):  # so that the names of the others still hold
            if moves_up:
                drop_block(plain, name)
            else:
                plain.set_submodule(name, nn.Identity())
        try:
            with evaluation(plain):
                outputs = plain(images)
        except Exception as error:
            problem = f"it fails: {error}"
            continue
        if difference(outputs, expected) <= 1e-3:
            return plain
    raise TeamNetError(f"{type(net).__name__} cannot do without {', '.join(names)}: {problem}.")

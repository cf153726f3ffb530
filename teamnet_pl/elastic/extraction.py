"""Taking blocks out of a plain net."""

from __future__ import annotations

import re

from torch import nn


def drop_block(net: nn.Module, name: str) -> None:
    """Takes one block out of a net, in place, as if the net had been built without it.

    In a `torch.nn.Sequential` the blocks behind it move up and take over its number, so the names
    are those of a shallower net. Any other parent calls its blocks in a way of its own: there an
    identity takes the block's place.

    Args:
        net: The net.
        name: Name of the block in it, such as ``layer3.1``.

    Raises:
        AttributeError: If there is no such block.
    """
    parent_name, _, key = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    if type(parent).forward is not nn.Sequential.forward:
        setattr(parent, key, nn.Identity())
        return
    keys = list(parent._modules)
    modules = [module for other, module in parent._modules.items() if other != key]
    numbered = len({re.sub(r"\d+$", "", other) for other in keys}) == 1
    names = keys[:-1] if numbered else [other for other in keys if other != key]
    parent._modules.clear()
    parent._modules.update(zip(names, modules, strict=True))

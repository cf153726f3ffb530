"""The members of a team: their names, logits and probabilities. Needs no Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from teamnet_pl.elastic import AdaptiveNet, Depth

LEADER = "leader"
ENSEMBLE = "ensemble"
"""Name of an averaged prediction. In an evaluation it is that of the Teammates' deepest depths; as
a teacher it has the Leader's, too, see `Cooperation`."""


def depth_names(teammates: Mapping[str, AdaptiveNet]) -> list[str]:
    """Lists the names of each depth of each Teammate, such as ``a/d7``."""
    return [f"{name}/{depth}" for name, net in teammates.items() for depth in net.depths]


def member_names(
    teammates: Mapping[str, AdaptiveNet], leader: nn.Module | None = None
) -> list[str]:
    """Lists the names of all members: the Leader, if there is one, and each depth.

    Args:
        teammates: The Teammates by name.
        leader: The Leader.
    """
    return ([] if leader is None else [LEADER]) + depth_names(teammates)


def evaluated_names(
    teammates: Mapping[str, AdaptiveNet], leader: nn.Module | None = None
) -> list[str]:
    """Lists the names of all that is evaluated: the members, and the ensemble of two or more nets.

    Args:
        teammates: The Teammates by name.
        leader: The Leader.
    """
    return member_names(teammates, leader) + ([ENSEMBLE] if len(teammates) > 1 else [])


def member_logits(
    teammates: Mapping[str, AdaptiveNet],
    leader: nn.Module | None,
    images: Tensor,
    depths: Mapping[str, Sequence[Depth]] | None = None,
) -> dict[str, Tensor]:
    """Runs all members: the Leader once and each Teammate once, packed.

    Args:
        teammates: The Teammates by name.
        leader: The Leader, if there is one.
        images: Shape ``(N, channels, height, width)``.
        depths: The depths of each Teammate to run, the deepest first; all by default.

    Returns:
        Logits by the member's name, each ``(N, classes)`` and of at least single precision.
    """
    logits = {}
    if leader is not None:
        logits[LEADER] = at_least_single(leader(images))
    for name, net in teammates.items():
        run = net.depths if depths is None else depths[name]
        packed = at_least_single(net.packed(images, run))
        logits |= {f"{name}/{depth}": values for depth, values in zip(run, packed, strict=True)}
    return logits


def member_probabilities(
    teammates: Mapping[str, AdaptiveNet], logits: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Turns logits into class probabilities, and adds the Teammates' averaged prediction.

    Args:
        teammates: The Teammates by name.
        logits: By the member's name, each ``(N, classes)``.

    Returns:
        Probabilities by the member's name, each ``(N, classes)``, all NaN for an image of which a
        logit is not finite; with two or more Teammates also ``ensemble``, the mean of their deepest
        depths.
    """
    probabilities = {member: _softmax(values) for member, values in logits.items()}
    if len(teammates) > 1:
        deepest = [f"{name}/{net.depths[0]}" for name, net in teammates.items()]
        stacked = torch.stack([probabilities[member] for member in deepest])
        probabilities[ENSEMBLE] = stacked.mean(dim=0)
    return probabilities


def at_least_single(logits: Tensor) -> Tensor:
    """Converts half-precision values, which are too coarse for losses and metrics."""
    return logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits


def _softmax(logits: Tensor) -> Tensor:
    finite = logits.isfinite().all(dim=-1, keepdim=True)
    return logits.softmax(dim=-1).masked_fill(~finite, torch.nan)

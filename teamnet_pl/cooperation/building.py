"""The nets of a team, made of configs or taken as modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from teamnet_pl.backbones import create_backbone
from teamnet_pl.cooperation.configs import Leader, Teammate
from teamnet_pl.cooperation.members import ENSEMBLE, LEADER
from teamnet_pl.elastic import AdaptiveNet, ElasticNet
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.errors import TeamNetError


def name_teammates(
    a: Teammate, b: Teammate | None, extra: Mapping[str, Teammate]
) -> dict[str, Teammate]:
    """Puts the Teammates in one mapping by name.

    Args:
        a: The first Teammate.
        b: The second, if there is one.
        extra: More Teammates, by names that also stand in files, metrics and options.

    Raises:
        TeamNetError: If a name is taken, or is not a word.
    """
    taken = {"a", "b", LEADER, ENSEMBLE}
    for name in extra:
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name in taken:
            raise TeamNetError(
                f"The extra Teammate {name!r} needs another name: a letter, then letters, digits "
                f"and underscores, and none of {', '.join(sorted(taken))}."
            )
    return {"a": a} | ({} if b is None else {"b": b}) | dict(extra)


def check_distinct(leader: Leader | None, teammates: Mapping[str, Teammate]) -> None:
    """Refuses modules that share weights.

    Args:
        leader: The Leader, if there is one.
        teammates: The Teammates by name.

    Raises:
        TeamNetError: If two of them do.
    """
    owners: dict[nn.Parameter, str] = {}
    for name, member in {LEADER: leader, **teammates}.items():
        parameters = list(member.parameters()) if isinstance(member, nn.Module) else []
        if owner := next((owners[p] for p in parameters if p in owners), None):
            raise TeamNetError(
                f"The modules {owner} and {name} share weights: pass separate modules."
            )
        owners |= dict.fromkeys(parameters, name)


def make_leader(
    leader: Leader | None, num_classes: int, input_shape: Sequence[int]
) -> tuple[nn.Module | None, bool]:
    """Makes the net of the Leader.

    Args:
        leader: Its config, or the net itself; None for no Leader.
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        The net, and whether it only teaches: none of its parameters requires a gradient.

    Raises:
        TeamNetError: If there is no such backbone, or a module has another number of classes.
        FileNotFoundError: If there is no file with the weights to start from.
    """
    if leader is None:
        return None, False
    if isinstance(leader, nn.Module):
        net = leader
        _check_logits(LEADER, net, num_classes, input_shape)
    else:
        net = create_backbone(leader, num_classes, input_shape[0])
        net.requires_grad_(not leader.frozen)
    is_frozen = not any(parameter.requires_grad for parameter in net.parameters())
    return net.train(not is_frozen), is_frozen


def make_teammate(
    name: str, teammate: Teammate, num_classes: int, input_shape: Sequence[int]
) -> AdaptiveNet:
    """Makes the net of a Teammate.

    Args:
        name: Its name, for messages.
        teammate: Its config, a net of several depths, or a backbone that becomes elastic with
            default depths.
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Raises:
        TeamNetError: If there is no such backbone, it cannot be elastic, its depths do not fit, or
            a module has another number of classes.
        FileNotFoundError: If there is no file with the weights to start from.
    """
    if not isinstance(teammate, nn.Module):
        backbone = create_backbone(teammate, num_classes, input_shape[0])
        net = teammate.net_class()(backbone, input_shape, **teammate.elastic_options())
        _check_kind(name, net)
        return net
    net = teammate if isinstance(teammate, AdaptiveNet) else ElasticNet(teammate, input_shape)
    _check_kind(name, net)
    _check_logits(name, net, num_classes, input_shape)
    return net.train()  # a net in evaluation mode would stay so, and its norms would learn nothing


def describe_member(member: Leader | Teammate | None) -> dict[str, Any] | None:
    """Describes a member as plain values, without weights to start from.

    Args:
        member: Its config or module; None for no member.

    Returns:
        The fields of the config, or the class of the module as ``module``.
    """
    if member is None:
        return None
    if isinstance(member, nn.Module):
        net = member.backbone if isinstance(member, ElasticNet) else member
        return {"module": f"{type(net).__module__}.{type(net).__qualname__}"}
    return asdict(member.without_weights())


def _check_kind(name: str, net: AdaptiveNet) -> None:
    """Refuses an elastic net whose outputs are no logits, of which a team knows no loss."""
    if isinstance(net, ElasticNet) and not net.returns_logits:
        raise TeamNetError(
            f"{name} ({type(net.backbone).__name__}) must return logits (N, classes) alone, in "
            "training and evaluation. Switch off auxiliary heads and the like by the net's own "
            "options. (`ElasticNet` takes such nets, for training loops of your own.)"
        )


def _check_logits(name: str, net: nn.Module, num_classes: int, shape: Sequence[int]) -> None:
    """Refuses a module with another number of classes, before the first batch would."""
    with evaluation(net):
        logits = net(example_images(net, 2, shape))
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TeamNetError(
            f"The module {name} ({type(net).__name__}) must return logits of shape "
            f"(N, {num_classes}); for N=2 it returned {returned}."
        )

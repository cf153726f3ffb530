"""The members of a team as plain data, and how a file brings them back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from teamnet_pl.backbones import BackboneConfig
from teamnet_pl.cooperation.optimization import OptimizerConfig, ScheduleConfig
from teamnet_pl.cooperation.transfers import Cooperation
from teamnet_pl.elastic import DepthPolicy, DepthSpec
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust

Config = TypeVar("Config")
Member = TypeVar("Member", bound=BackboneConfig)


@dataclass(frozen=True)
class LeaderConfig(BackboneConfig):
    """The Leader.

    Attributes:
        frozen: Whether it only teaches: evaluation mode, no gradient, no label loss.
    """

    frozen: bool = False


@dataclass(frozen=True)
class TeammateConfig(BackboneConfig):
    """A Teammate.

    Attributes:
        depths: How many depths, or the number of blocks that each keeps, or the number that each
            keeps in each stage; see `teamnet_pl.elastic.derive_depths`.
        policy: The order in which blocks are dropped.
        interleaved: Whether a number of depths lie between those of a Teammate that is not.
        blocks: Names of the skippable blocks, with wildcards; by default they are found.
        per_depth_affine: Whether batch norms have weights and biases per depth.
        grad_checkpointing: Whether blocks run again in the backward pass: less memory, more time.
    """

    depths: DepthSpec = 4
    policy: DepthPolicy = "last_stage_first"
    interleaved: bool = False
    blocks: list[str] | None = None
    per_depth_affine: bool = False
    grad_checkpointing: bool = False

    def elastic_options(self) -> dict[str, Any]:
        """The arguments of `ElasticNet` beside the backbone and its input's shape."""
        inherited = fields(BackboneConfig)
        names = [field.name for field in fields(TeammateConfig)[len(inherited) :]]
        return {name: getattr(self, name) for name in names}


_MEMBERS: dict[str, type[BackboneConfig]] = {
    "leader": LeaderConfig,
    "a": TeammateConfig,
    "b": TeammateConfig,
}
_OTHERS: dict[str, type[Any]] = {
    "cooperation": Cooperation,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
}


def restore_config(kind: type[Config], key: str, values: object, trust: Trust) -> Config:
    """Makes a config of the plain values in a file.

    Args:
        kind: Class of the config, a dataclass.
        key: Dotted name of the values, such as ``model.schedule``.
        values: The values of its fields, by name.
        trust: What the values may name.

    Raises:
        ValueError: If the values are not a mapping, do not fit the fields, or are not trusted.
    """
    if not isinstance(values, Mapping):
        raise TeamNetError(f"{trust.source}: {key} must be a mapping, found {values!r}.")
    trust.check_plain(key, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config")
    try:
        config: Config = parser.instantiate(parser.parse_object({"config": dict(values)})).config
    except (ArgumentError, TypeError, ValueError) as error:
        raise TeamNetError(
            f"{trust.source}: {key} does not hold what it should: {error}"
        ) from error
    return config


def restore_member(kind: type[Member], key: str, values: object, trust: Trust) -> Member:
    """Makes the config of a member of the plain values in a file, without weights to start from.

    Args:
        kind: Class of the config.
        key: Dotted name of the values, such as ``model.a``.
        values: The values of its fields, by name.
        trust: Whether the backbone may be one of an import path.

    Raises:
        ValueError: As `restore_config`.
    """
    if isinstance(values, Mapping):
        trust.check_backbone(f"{key}.name", values.get("name"))
    return restore_config(kind, key, values, trust).without_weights()


def restore_arguments(
    kind: type[Any], hyper_parameters: Mapping[str, Any], trust: Trust
) -> dict[str, Any]:
    """Makes the arguments of a `Team` of the hyper-parameters in a checkpoint.

    Args:
        kind: The class, `Team` or a subclass.
        hyper_parameters: Plain values.
        trust: What they may name.

    Returns:
        The arguments by name, those of a class of your own with plain values as they are.

    Raises:
        ValueError: If a value does not fit or is not trusted, or there is no such argument.
    """
    accepted = inspect.signature(kind).parameters
    if unknown := [str(name) for name in hyper_parameters if name not in accepted]:
        raise TeamNetError(
            f"{trust.source} holds arguments that {kind.__name__} does not take: "
            f"{', '.join(unknown)}. Load it by the class that saved it."
        )
    arguments: dict[str, Any] = {}
    for name, value in hyper_parameters.items():
        key = f"model.{name}"
        if name in _MEMBERS:
            arguments[name] = value and restore_member(_MEMBERS[name], key, value, trust)
        elif name in _OTHERS:
            arguments[name] = restore_config(_OTHERS[name], key, value, trust)
        else:
            trust.check_plain(key, value)
            arguments[name] = value
    return arguments

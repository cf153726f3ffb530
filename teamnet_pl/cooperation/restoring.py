"""Configs, hyper-parameters and weights of a team, restored from the plain values in a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from teamnet_pl.backbones import BackboneConfig
from teamnet_pl.cooperation.configs import LeaderConfig, TeammateConfig
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust

Config = TypeVar("Config")
Member = TypeVar("Member", bound=BackboneConfig)

RUN_KEY = "teamnet"
"""Key of `Team.run` in a checkpoint."""

_MEMBERS: dict[str, type[BackboneConfig]] = {
    "leader": LeaderConfig,
    "a": TeammateConfig,
    "b": TeammateConfig,
}


def restore_config(kind: type[Config], key: str, values: object, trust: Trust) -> Config:
    """Makes a config of the plain values in a file.

    Args:
        kind: Class of the config, a dataclass.
        key: Dotted name of the values, such as ``model.schedule``.
        values: The values of its fields, by name.
        trust: What the values may name.

    Raises:
        TeamNetError: If the values are not a mapping, do not fit the fields, or are not trusted.
    """
    if not isinstance(values, Mapping):
        raise TeamNetError(f"{trust.source}: {key} must be a mapping, found {values!r}.")
    trust.check_plain(key, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config")
    try:
        config: Config = parser.instantiate(parser.parse_object({"config": dict(values)})).config
    except (ArgumentError, TypeError, ValueError) as error:
        raise TeamNetError(f"{trust.source}: the values of {key} do not fit: {error}") from error
    return config


def restore_member(kind: type[Member], key: str, values: object, trust: Trust) -> Member:
    """Makes the config of a member of the plain values in a file, without weights to start from.

    Args:
        kind: Class of the config.
        key: Dotted name of the values, such as ``model.a``.
        values: The values of its fields, by name.
        trust: Whether the backbone may be one of an import path.

    Raises:
        TeamNetError: As `restore_config`, or if the member was a module instead of a config.
    """
    if isinstance(values, Mapping):
        if "module" in values:
            raise TeamNetError(
                f"{trust.source}: {key} was given as a module ({values['module']}), which a file "
                "cannot hold. Restore the team from Python and pass a module like it: "
                f"Team.load_from_checkpoint(path, {key.removeprefix('model.')}=...)."
            )
        trust.check_backbone(f"{key}.name", values.get("name"))
        trust.check_net(f"{key}.net", values.get("net"))
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
        The arguments by name; those that only a subclass has stay plain values.

    Raises:
        TeamNetError: If a value does not fit or is not trusted, or there is no such argument.
    """
    # Of training alone, which a Teammate that is served does without, as without Lightning.
    from teamnet_pl.cooperation.optimization import OptimizerConfig, ScheduleConfig
    from teamnet_pl.cooperation.transfers import Cooperation

    others: dict[str, type[Any]] = {
        "cooperation": Cooperation,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
    }
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
        elif name == "extra_teammates":
            arguments[name] = {
                teammate: restore_member(TeammateConfig, f"{key}.{teammate}", values, trust)
                for teammate, values in checked_extra_teammates(trust.source, value).items()
            }
        elif name in others:
            arguments[name] = restore_config(others[name], key, value, trust)
        else:
            trust.check_plain(key, value)
            arguments[name] = value
    return arguments


def checked_extra_teammates(source: object, values: object) -> dict[str, Any]:
    """Checks that the extra Teammates in a file are a mapping of names to values.

    Args:
        source: The file, for messages.
        values: The hyper-parameter ``extra_teammates``; None for no extra Teammate.

    Raises:
        TeamNetError: If they are not.
    """
    values = values or {}
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TeamNetError(
            f"{source}: extra_teammates must be a mapping of names to values, found {values!r}."
        )
    return dict(values)


def team_content(
    source: object, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Takes the hyper-parameters and the weights out of a checkpoint of a `Team`.

    Args:
        source: The file, for messages.
        checkpoint: Its content.

    Raises:
        TeamNetError: If it is not a checkpoint of a team.
    """
    values, weights = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
    required = {"num_classes", "input_shape", "a", "b"}
    if not isinstance(values, Mapping) or not required <= values.keys():
        raise TeamNetError(
            f"{source} is not a checkpoint of a team: it holds "
            f"{', '.join(map(str, checkpoint))}. Give one that teamnet fit saved."
        )
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise TeamNetError(f"{source} does not hold weights (state_dict): use another copy of it.")
    check_task(source, values["num_classes"], values["input_shape"])
    return dict(values), dict(weights)


def check_task(source: object, num_classes: object, input_shape: object) -> None:
    """Checks the number of classes and the shape of images that come from a file.

    Args:
        source: The file, for messages.
        num_classes: Should be 2 or more.
        input_shape: Should be ``(channels, height, width)``.

    Raises:
        TeamNetError: If they are not.
    """
    if type(num_classes) is not int or num_classes < 2:
        raise TeamNetError(f"{source}: num_classes must be 2 or more, found {num_classes!r}.")
    if (
        not isinstance(input_shape, list | tuple)
        or len(input_shape) != 3
        or any(type(size) is not int or size < 1 for size in input_shape)
    ):
        raise TeamNetError(
            f"{source}: input_shape must be (channels, height, width), found {input_shape!r}."
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: object, strict: bool = True
) -> None:
    """Loads weights into a module.

    Args:
        module: The module.
        weights: By name.
        source: The file that they come from, for messages.
        strict: Whether the names must be those of the module.

    Raises:
        TeamNetError: If they do not fit.
    """
    try:
        module.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise TeamNetError(f"The weights in {source} are not those of its team: {error}") from error

"""Making a backbone from its name.

Neither torchvision nor timm is imported until a backbone of theirs is made.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from teamnet_pl.backbones.adapt import adapt_weights
from teamnet_pl.backbones.weights import read_weights
from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import close_names

if TYPE_CHECKING:
    from typing_extensions import Self  # not in Python 3.10's typing

_Factory = Callable[..., nn.Module]
_Shape = tuple[int, int, int]

_WEIGHTS_OPTIONS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")
_CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


@dataclass(frozen=True)
class BackboneConfig:
    """A backbone by name.

    Attributes:
        name: ``torchvision/<model>``, ``timm/<model>``, or for images of about 32² ``cifar/``
            followed by ``resnet20`` (32, 44, 56, 110), ``resnet20x2`` (or any other multiple of its
            width), ``wrn28_10`` (or any other wide ResNet) or a ResNet of torchvision, such as
            ``resnet18``, whose stem then keeps the resolution. Or
            the import path of a class or function that returns a module, such as
            ``my_package.MyNet``; it is called with the arguments ``num_classes`` and
            ``in_channels``, or with those of them that it takes.
        options: Further arguments of the model, such as ``{width: 32}``. Pretrained weights are
            the library's own option: ``{pretrained: true}`` for timm, ``{weights: DEFAULT}`` for
            torchvision.
        checkpoint: File with weights to start from, in safetensors or PyTorch's format: a state
            dict, or a checkpoint that Lightning or the scripts of timm or torchvision saved. If
            they are for another number of classes, or without a classifier, it starts with new
            weights; if they are for another number of channels, the weights of the first
            convolution are summed or repeated.
        checkpoint_prefix: The beginning of the names of the backbone's weights in that file, such
            as ``leader.`` or ``teammates.a.backbone.`` in the checkpoint of a team.
        checkpoint_averaged: Whether to take the averaged weights (EMA) that the scripts of timm and
            torchvision save beside the last ones.
    """

    name: str = "cifar/resnet20"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_prefix: str = ""
    checkpoint_averaged: bool = False

    @property
    def new_classifiers(self) -> bool:
        """Whether classifiers may start with new weights."""
        return True

    def without_weights(self) -> Self:
        """Returns the same backbone without pretrained weights, for weights from elsewhere."""
        options = {key: value for key, value in self.options.items() if key not in _WEIGHTS_OPTIONS}
        return replace(
            self, options=options, checkpoint=None, checkpoint_prefix="", checkpoint_averaged=False
        )


def create_backbone(config: BackboneConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Makes a backbone.

    Args:
        config: Its name, options and weights.
        num_classes: Number of its classes.
        in_channels: Number of channels of its images.

    Returns:
        A module that maps images ``(N, in_channels, height, width)`` to logits
        ``(N, num_classes)``.

    Raises:
        TeamNetError: If there is no backbone of this name, it does not take the options, or the
            weights do not fit it.
        FileNotFoundError: If the file with weights does not exist.

    Examples:
        >>> import torch
        >>> net = create_backbone(BackboneConfig("timm/resnet18"), num_classes=7, in_channels=1)
        >>> net(torch.randn(2, 1, 64, 64)).shape
        torch.Size([2, 7])
    """
    factory, channels_argument = _find_factory(config.name)
    arguments: dict[str, Any] = {"num_classes": num_classes, channels_argument: in_channels}
    if "/" not in config.name:
        arguments = _accepted_by(factory, arguments)
    try:
        backbone = factory(**{**arguments, **config.options})
    except TypeError as error:
        raise TeamNetError(
            f"The backbone {config.name} cannot be made with the options {config.options}: {error}."
        ) from error
    if config.checkpoint is not None:
        _load_weights(backbone, config, config.checkpoint, num_classes)
    return backbone


def default_input_shape(config: BackboneConfig) -> tuple[int, int, int]:
    """Returns the image shape that a backbone was designed for.

    Returns:
        Channels, height and width: as listed by timm for its models, 32² for ``cifar/``, else 224².
    """
    prefix, _, model = config.name.partition("/")
    return SOURCES[prefix].input_shape(model) if prefix in SOURCES else _imagenet_shape(model)


def has_source(name: str) -> bool:
    """Tells whether a name has the prefix of a source, rather than being an import path."""
    prefix, slash, _ = name.partition("/")
    return bool(slash) and prefix in SOURCES


def _find_factory(name: str) -> tuple[_Factory, str]:
    """Finds the function that makes a backbone, and its argument for the number of channels."""
    prefix, slash, model = name.partition("/")
    if "." in name and not slash:
        return _import_factory(name), "in_channels"
    if prefix not in SOURCES or not slash:
        _raise_unknown(name, _meant(name))
    source = SOURCES[prefix]
    factory = source.factory(model)
    if factory is None:
        names = [f"{prefix}/{known}" for known in source.models()]
        _raise_unknown(name, close_names(name, names, count=5) or names[:5])
    return factory, source.channels_argument


def _bind(factory: _Factory, **fixed: Any) -> _Factory:
    """Fixes arguments; to give them again is an error, unlike with `functools.partial`."""
    return lambda **arguments: factory(**fixed, **arguments)


def _import_factory(path: str) -> _Factory:
    module, _, name = path.rpartition(".")
    try:
        factory: _Factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TeamNetError(
            f"The backbone {path!r} cannot be imported: {error}. {_forms()} such as "
            "my_package.MyNet."
        ) from error
    return factory


def _accepted_by(factory: _Factory, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _cifar_factory(model: str) -> _Factory | None:
    from teamnet_pl.backbones.from_torchvision import resnet_names, small_image_resnet
    from teamnet_pl.backbones.wide_resnet import WideResNet

    name, times, factor = model.partition("x")
    if name in _CIFAR_RESNETS and (not times or re.fullmatch(r"[1-9]\d?", factor)):
        return _bind(_multiplied, depth=_CIFAR_RESNETS[name], factor=int(factor or 1))
    if wide := re.fullmatch(r"wrn(\d+)_(\d+)", model):
        return _bind(WideResNet, depth=int(wide[1]), width=int(wide[2]))
    return _bind(small_image_resnet, name=model) if model in resnet_names() else None


def _multiplied(factor: int, width: int = 16, **arguments: Any) -> nn.Module:
    from teamnet_pl.backbones.cifar_resnet import CifarResNet

    return CifarResNet(width=factor * width, **arguments)


def _cifar_models() -> list[str]:
    from teamnet_pl.backbones.from_torchvision import resnet_names

    return [*_CIFAR_RESNETS, "resnet20x2", "wrn28_10", *resnet_names()]


def _torchvision_factory(model: str) -> _Factory | None:
    from teamnet_pl.backbones.from_torchvision import torchvision_model

    return _bind(torchvision_model, name=model) if model in _torchvision_models() else None


def _torchvision_models() -> list[str]:
    from teamnet_pl.backbones.from_torchvision import model_names

    return model_names()


def _timm_factory(model: str) -> _Factory | None:
    import timm

    return _bind(timm.create_model, model_name=model) if timm.is_model(model) else None


def _timm_models() -> list[str]:
    import timm

    models: list[str] = timm.list_models()
    return models


def _timm_shape(model: str) -> _Shape:
    import timm

    if pretrained := timm.get_pretrained_cfg(model):
        channels, height, width = pretrained.input_size
        return channels, height, width
    return _imagenet_shape(model)


def _imagenet_shape(_model: str) -> _Shape:
    return 3, 224, 224


@dataclass(frozen=True)
class Source:
    """The backbones whose names share a prefix.

    Attributes:
        factory: Maps the name of a model, without the prefix, to the function that makes it, or to
            None if there is no such model. The function takes ``num_classes``, the number of
            channels and the user's options, all by keyword.
        models: Lists the names of the models, for suggestions.
        channels_argument: The name of that function's argument for the number of channels.
        input_shape: Maps the name of a model to the image shape that it was designed for.
    """

    factory: Callable[[str], _Factory | None]
    models: Callable[[], Sequence[str]]
    channels_argument: str = "in_channels"
    input_shape: Callable[[str], _Shape] = _imagenet_shape


SOURCES = {
    "cifar": Source(_cifar_factory, _cifar_models, input_shape=lambda _model: (3, 32, 32)),
    "torchvision": Source(_torchvision_factory, _torchvision_models),
    "timm": Source(_timm_factory, _timm_models, "in_chans", _timm_shape),
}
"""The sources of backbones, by the prefix of their names. A checkpoint may name these untrusted."""


def _forms() -> str:
    """Describes the forms of a backbone's name, for messages."""
    forms = ", ".join(f"{prefix}/<model>" for prefix in SOURCES)
    return f"A backbone is {forms} or an import path"


def _meant(name: str) -> list[str]:
    """Finds the models whose names are like one without the prefix of a source, or with another."""
    models = {prefix: source.models() for prefix, source in SOURCES.items()}
    close = close_names(name.rpartition("/")[2], chain(*models.values()), count=5)
    return [
        f"{prefix}/{each}" for prefix, known in models.items() for each in known if each in close
    ]


def _raise_unknown(name: str, meant: Sequence[str]) -> NoReturn:
    question = f"Did you mean {' or '.join(meant)}? " if meant else ""
    raise TeamNetError(
        f"There is no backbone {name!r}. {question}{_forms()} such as my_package.MyNet."
    )


def _load_weights(backbone: nn.Module, config: BackboneConfig, path: str, num_classes: int) -> None:
    prefix = config.checkpoint_prefix
    weights = read_weights(path, prefix, averaged=config.checkpoint_averaged)
    try:
        adapted = adapt_weights(
            backbone, weights, num_classes, path, new_classifiers=config.new_classifiers
        )
        backbone.load_state_dict(adapted)
    except (AttributeError, RuntimeError) as error:
        beginnings = sorted({str(name).partition(".")[0] for name in weights})
        raise TeamNetError(
            f"The weights in {path} do not fit {config.name} (prefix {prefix!r}; names in the file "
            f"begin with {', '.join(beginnings)}): {error}"
        ) from error

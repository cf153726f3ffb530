"""From a name to a backbone."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import timm
import torchvision
from timm.models import adapt_input_conv
from torch import nn

from teamnet_pl.backbones.cifar_resnet import CifarResNet
from teamnet_pl.checkpoints import load_checkpoint

_WEIGHTS_OPTIONS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")
_CIFAR = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


@dataclass
class BackboneConfig:
    """A backbone by name.

    Attributes:
        name: ``cifar/resnet20`` (20, 32, 44, 56, 110), ``torchvision/<model>``, ``timm/<model>``,
            or the import path of a class or function that returns a module, such as
            ``my_package.MyNet``; of the arguments ``num_classes`` and ``in_channels`` it is given
            those that it takes.
        options: Further arguments of the model, such as ``{width: 32}`` or ``{pretrained: true}``.
        checkpoint: File with weights to start from: a state dict, or a Lightning checkpoint (its
            ``state_dict``).
        checkpoint_prefix: What the names of the backbone's weights begin with in that file, such
            as, in a team's checkpoint, ``leader.`` or ``teammates.a.backbone.``.
    """

    name: str = "cifar/resnet20"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_prefix: str = ""

    def without_weights(self) -> BackboneConfig:
        """The same backbone from scratch, for weights that come from elsewhere."""
        options = {key: value for key, value in self.options.items() if key not in _WEIGHTS_OPTIONS}
        return replace(self, options=options, checkpoint=None, checkpoint_prefix="")


def create_backbone(config: BackboneConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Makes a backbone.

    Args:
        config: Its name, options and weights.
        num_classes: Number of classes that it tells apart.
        in_channels: Number of channels of its images.

    Returns:
        A module that maps images ``(N, in_channels, height, width)`` to logits
        ``(N, num_classes)``.

    Raises:
        ValueError: If there is no backbone of this name, it does not take the options, or the
            weights do not fit it.
        FileNotFoundError: If there is no such file with weights.

    Example:
        >>> import torch
        >>> net = create_backbone(BackboneConfig("timm/resnet18"), num_classes=7, in_channels=1)
        >>> net(torch.randn(2, 1, 64, 64)).shape
        torch.Size([2, 7])
    """
    library, slash, name = config.name.partition("/")
    if not slash:
        factory, channels = _imported(config.name), "in_channels"
    elif library == "cifar":
        depth = _CIFAR.get(name) or _unknown(config.name, (f"cifar/{own}" for own in _CIFAR))
        factory, channels = _partial(CifarResNet, depth=depth), "in_channels"
    elif library == "torchvision":
        models = torchvision.models.list_models(module=torchvision.models)
        if name not in models:
            _unknown(config.name, (f"torchvision/{own}" for own in models))
        factory, channels = torchvision.models.get_model_builder(name), None
    elif library == "timm":
        if not timm.is_model(name):
            _unknown(config.name, (f"timm/{own}" for own in timm.list_models()))
        factory, channels = _partial(timm.create_model, model_name=name), "in_chans"
    else:
        _unknown(config.name, ("cifar/", "torchvision/", "timm/"))
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if channels:
        arguments[channels] = in_channels
    if not slash:
        accepted = inspect.signature(factory).parameters
        if not any(own.kind is own.VAR_KEYWORD for own in accepted.values()):
            arguments = {key: value for key, value in arguments.items() if key in accepted}
    try:
        backbone = factory(**{**arguments, **config.options})
    except TypeError as error:
        raise ValueError(
            f"The backbone {config.name} cannot be made with the options {config.options}: {error}."
        ) from error
    if library == "torchvision" and in_channels != 3:
        _adapt_channels(backbone, in_channels)
    if config.checkpoint is not None:
        _load(backbone, config, config.checkpoint)
    return backbone


def own_input_shape(config: BackboneConfig) -> tuple[int, int, int]:
    """The image shape that a backbone was designed for.

    Returns:
        Channels, height and width: what timm says of its models, 32² for ``cifar/``, else 224².
    """
    library, _, name = config.name.partition("/")
    if library == "timm" and (known := timm.get_pretrained_cfg(name)):
        channels, height, width = known.input_size
        return channels, height, width
    size = 32 if library == "cifar" else 224
    return 3, size, size


def _partial(factory: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    return lambda **arguments: factory(**fixed, **arguments)


def _unknown(name: str, known: Iterable[str]) -> NoReturn:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or names[:10]
    raise ValueError(
        f"There is no backbone {name!r}. Did you mean {', '.join(close)}? A backbone is "
        "cifar/<model>, torchvision/<model>, timm/<model> or an import path."
    )


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The backbone {path!r} cannot be imported: {error}. A backbone is cifar/<model>, "
            "torchvision/<model>, timm/<model> or an import path such as my_package.MyNet."
        ) from error
    return factory


def _adapt_channels(backbone: nn.Module, in_channels: int) -> None:
    """Replaces a net's first convolution, with its weights summed or repeated as timm does."""
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    conv.weight = nn.Parameter(adapt_input_conv(in_channels, conv.weight.detach()))
    conv.in_channels = in_channels


def _load(backbone: nn.Module, config: BackboneConfig, path: str) -> None:
    state = load_checkpoint(path)
    state = state.get("state_dict", state)
    prefix = config.checkpoint_prefix
    weights = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    try:
        backbone.load_state_dict(weights)
    except (AttributeError, RuntimeError) as error:
        top = sorted({str(name).partition(".")[0] for name in state})
        raise ValueError(
            f"The weights in {path} do not fit {config.name} (prefix {prefix!r}; names in the file "
            f"begin with {', '.join(top)}): {error}"
        ) from error

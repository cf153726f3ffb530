"""From a name to a backbone."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import timm
import torchvision
from torch import nn

from teamnet_pl.backbones.adapting import adapt_weights
from teamnet_pl.backbones.cifar_resnet import CifarResNet
from teamnet_pl.backbones.from_torchvision import small_image_resnet, torchvision_model
from teamnet_pl.backbones.wide_resnet import WideResNet
from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.errors import TeamNetError

if TYPE_CHECKING:
    from typing_extensions import Self  # not in Python 3.10's typing

_WEIGHTS_OPTIONS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")
_RESNETS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if torchvision.models.get_model_builder(name).__module__ == torchvision.models.resnet.__name__
]
_CIFAR = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


@dataclass(frozen=True)
class BackboneConfig:
    """A backbone by name.

    Attributes:
        name: ``torchvision/<model>``, ``timm/<model>``, or for images of about 32² ``cifar/``
            followed by ``resnet20`` (32, 44, 56, 110), ``wrn28_10`` (or any other wide ResNet) or
            a ResNet of torchvision, such as ``resnet18``, whose stem then keeps the resolution. Or
            the import path of a class or function that returns a module, such as
            ``my_package.MyNet``; of the arguments ``num_classes`` and ``in_channels`` it is given
            those that it takes.
        options: Further arguments of the model, such as ``{width: 32}``. Pretrained weights are
            the library's own option: ``{pretrained: true}`` for timm, ``{weights: DEFAULT}`` for
            torchvision.
        checkpoint: File with weights to start from, in safetensors or PyTorch's format: a state
            dict, or a Lightning checkpoint (its ``state_dict``). Where it is of another number of
            classes the classifier starts anew, where it is of another number of channels the first
            convolution is summed or repeated.
        checkpoint_prefix: What the names of the backbone's weights begin with in that file, such
            as, in a team's checkpoint, ``leader.`` or ``teammates.a.backbone.``.
    """

    name: str = "cifar/resnet20"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_prefix: str = ""

    def without_weights(self) -> Self:
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
        factory, channels = _for_small_images(name), "in_channels"
    elif library == "torchvision":
        models = torchvision.models.list_models(module=torchvision.models)
        if name not in models:
            _unknown(config.name, (f"torchvision/{own}" for own in models))
        factory, channels = _partial(torchvision_model, name=name), "in_channels"
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
        raise TeamNetError(
            f"The backbone {config.name} cannot be made with the options {config.options}: {error}."
        ) from error
    if config.checkpoint is not None:
        _load(backbone, config, config.checkpoint, num_classes)
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
    raise TeamNetError(
        f"There is no backbone {name!r}. Did you mean {', '.join(close)}? A backbone is "
        "cifar/<model>, torchvision/<model>, timm/<model> or an import path."
    )


def _for_small_images(name: str) -> Callable[..., nn.Module]:
    if name in _CIFAR:
        return _partial(CifarResNet, depth=_CIFAR[name])
    if wide := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        return _partial(WideResNet, depth=int(wide[1]), width=int(wide[2]))
    if name in _RESNETS:
        return _partial(small_image_resnet, name=name)
    _unknown(f"cifar/{name}", (f"cifar/{own}" for own in (*_CIFAR, "wrn28_10", *_RESNETS)))


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TeamNetError(
            f"The backbone {path!r} cannot be imported: {error}. A backbone is cifar/<model>, "
            "torchvision/<model>, timm/<model> or an import path such as my_package.MyNet."
        ) from error
    return factory


def _load(backbone: nn.Module, config: BackboneConfig, path: str, num_classes: int) -> None:
    state = load_checkpoint(path)
    state = state.get("state_dict", state)
    prefix = config.checkpoint_prefix
    weights = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    try:
        backbone.load_state_dict(adapt_weights(backbone, weights, num_classes, path))
    except (AttributeError, RuntimeError) as error:
        top = sorted({str(name).partition(".")[0] for name in state})
        raise TeamNetError(
            f"The weights in {path} do not fit {config.name} (prefix {prefix!r}; names in the file "
            f"begin with {', '.join(top)}): {error}"
        ) from error

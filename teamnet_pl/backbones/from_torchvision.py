"""torchvision's classifiers, for any number of classes and channels."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import conv3x3

from teamnet_pl.backbones.adapt import adapt_channels, adapt_classes
from teamnet_pl.errors import TeamNetError


def model_names() -> list[str]:
    """Lists the classifiers of torchvision."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def resnet_names() -> list[str]:
    """Lists the ResNets of torchvision."""
    module = torchvision.models.resnet.__name__
    get_builder = torchvision.models.get_model_builder
    return [name for name in model_names() if get_builder(name).__module__ == module]


def torchvision_model(
    name: str, num_classes: int, in_channels: int, weights: Any = None, **options: Any
) -> nn.Module:
    """Makes a model of torchvision.

    Args:
        name: Its name in torchvision, such as ``resnet50``.
        num_classes: Number of classes. If pretrained weights are for another number, the
            classifier starts with new weights.
        in_channels: Number of channels. If it is not three, the weights of the first convolution
            are summed or repeated.
        weights: Pretrained weights by their name in torchvision, such as ``DEFAULT``.
        options: Further arguments of the model.

    Raises:
        TeamNetError: If there are no such weights.
    """
    pretrained = None
    if weights is not None:
        try:
            pretrained = torchvision.models.get_model_weights(name).verify(weights)
        except KeyError as error:
            names = ", ".join(torchvision.models.get_model_weights(name).__members__)
            raise TeamNetError(
                f"torchvision has no weights {weights!r} of {name}: choose DEFAULT or one of "
                f"{names}."
            ) from error
    classes = len(pretrained.meta["categories"]) if pretrained else num_classes
    builder = torchvision.models.get_model_builder(name)
    net: nn.Module = builder(weights=pretrained, num_classes=classes, **options)
    if classes != num_classes:
        adapt_classes(net, classes, num_classes)
    if in_channels != 3:
        adapt_channels(net, in_channels)
    return net


def small_image_resnet(name: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Makes a ResNet of torchvision for images of about 32², with a stem that keeps the resolution.

    As is usual on CIFAR, the stem is a 3x3 convolution without stride, and nothing is pooled.
    """
    net = torchvision_model(name, num_classes, in_channels, **options)
    stem = conv3x3(in_channels, 64)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()
    return net

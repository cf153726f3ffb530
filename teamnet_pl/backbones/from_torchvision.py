"""torchvision's classifiers, for any number of classes and channels."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import conv3x3

from teamnet_pl.backbones.adapting import adapt_channels, adapt_classes
from teamnet_pl.errors import TeamNetError


def torchvision_model(
    name: str, num_classes: int, in_channels: int, weights: Any = None, **options: Any
) -> nn.Module:
    """Makes a model of torchvision.

    Args:
        name: Such as ``resnet50``.
        num_classes: Number of classes. With pretrained weights of another number, the classifier
            is a fresh one.
        in_channels: Number of channels. Other than three, the first convolution's weights are
            summed or repeated.
        weights: Pretrained weights by their name in torchvision, such as ``DEFAULT``.
        options: Further arguments of the model.

    Raises:
        ValueError: If there are no such weights.
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
    """Makes a ResNet of torchvision for images of about 32²: its stem keeps the resolution.

    The stem is a convolution of 3x3, without stride, and no pooling, as usual on CIFAR.
    """
    net = torchvision_model(name, num_classes, in_channels, **options)
    stem = conv3x3(in_channels, 64)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()
    return net

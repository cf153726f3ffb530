"""Fitting a net, or weights for it, to other images and classes than it was made for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def adapt_channels(backbone: nn.Module, in_channels: int) -> None:
    """Gives a net's first convolution other channels, its weights summed or repeated as in timm."""
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    conv.weight = nn.Parameter(adapt_input_conv(in_channels, conv.weight.detach()))
    conv.in_channels = in_channels


def adapt_classes(backbone: nn.Module, classes: int, num_classes: int) -> None:
    """Replaces the layers that put out so many classes, auxiliary heads too, by fresh ones."""
    for name, layer in list(_classifiers(backbone, classes)):
        fresh: nn.Module
        if isinstance(layer, nn.Linear):
            fresh = nn.Linear(layer.in_features, num_classes, layer.bias is not None)
        else:  # of 1x1, as in SqueezeNet
            fresh = nn.Conv2d(layer.in_channels, num_classes, 1, bias=layer.bias is not None)
        backbone.set_submodule(name, fresh)


def adapt_weights(
    backbone: nn.Module, weights: dict[str, Any], num_classes: int, source: str
) -> dict[str, Any]:
    """Fits weights of a net for other images or classes to a backbone.

    Args:
        backbone: The net that is to get the weights.
        weights: A state dict of another net of its kind.
        num_classes: Number of classes that the backbone tells apart.
        source: Where the weights are from, for the log.

    Returns:
        The weights with the first convolution's channels summed or repeated, and with the
        backbone's own classifiers where those of the weights tell another number of classes apart.
    """
    own = backbone.state_dict()
    fitted = dict(weights)
    convs = (name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))
    first = f"{next(convs, '')}.weight"
    if first in own and first in weights and weights[first].shape[1:] != own[first].shape[1:]:
        fitted[first] = adapt_input_conv(own[first].shape[1], weights[first])
    for name, _ in _classifiers(backbone, num_classes):
        parts = [part for part in (f"{name}.weight", f"{name}.bias") if part in own]
        found = [weights[part].shape for part in parts if isinstance(weights.get(part), Tensor)]
        if found and all(shape[0] != num_classes for shape in found):
            logger.warning(
                "%s tells %d classes apart instead of %d: %s starts anew.",
                source, found[0][0], num_classes, name,
            )  # fmt: skip
            fitted |= {part: own[part] for part in parts}
    return fitted


def _classifiers(backbone: nn.Module, classes: int) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that put out one number for each class."""
    for name, module in backbone.named_modules():
        if (isinstance(module, nn.Linear) and module.out_features == classes) or (
            isinstance(module, nn.Conv2d) and module.out_channels == classes
        ):
            yield name, module

"""Adapting a net, or weights for it, to images or classes that it was not made for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from teamnet_pl.errors import TeamNetError

logger = logging.getLogger(__name__)


def adapt_channels(backbone: nn.Module, in_channels: int) -> None:
    """Gives the first convolution of a net another number of channels, in place.

    Its weights are summed or repeated, as in timm.

    Args:
        backbone: The net.
        in_channels: Number of channels of its images.
    """
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    conv.weight = nn.Parameter(_adapt_input_conv(in_channels, conv.weight.detach()))
    conv.in_channels = in_channels


def adapt_classes(backbone: nn.Module, old_num_classes: int, num_classes: int) -> None:
    """Replaces the classifiers of a net, those of auxiliary heads too, by new ones, in place.

    Args:
        backbone: The net.
        old_num_classes: Number of its classes, by which the classifiers are recognized.
        num_classes: Number of classes of the new ones.
    """
    for name, layer in list(_classifiers(backbone, old_num_classes)):
        classifier: nn.Module
        if isinstance(layer, nn.Linear):
            classifier = nn.Linear(layer.in_features, num_classes, layer.bias is not None)
        else:  # of 1x1, as in SqueezeNet
            bias = layer.bias is not None
            classifier = nn.Conv2d(layer.in_channels, num_classes, 1, bias=bias)
        backbone.set_submodule(name, classifier)


def adapt_weights(
    backbone: nn.Module,
    weights: dict[str, Any],
    num_classes: int,
    source: str,
    *,
    new_classifiers: bool = True,
) -> dict[str, Any]:
    """Adapts weights for other images or classes to a backbone.

    Args:
        backbone: The net that the weights are for.
        weights: A state dict of another net of its kind.
        num_classes: Number of classes of the backbone.
        source: Origin of the weights, for messages.
        new_classifiers: Whether classifiers may start with new weights.

    Returns:
        The weights, with the channels of the first convolution summed or repeated, and with the
        backbone's own classifiers where the weights are for another number of classes or without
        them.

    Raises:
        TeamNetError: If a classifier would start with new weights, unless that is accepted.
    """
    state = backbone.state_dict()
    adapted = dict(weights)
    convs = (name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))
    first = f"{next(convs, '')}.weight"
    if first in state and first in weights and weights[first].shape[1:] != state[first].shape[1:]:
        adapted[first] = _adapt_input_conv(state[first].shape[1], weights[first])
    for name, _ in _classifiers(backbone, num_classes):
        keys = [key for key in (f"{name}.weight", f"{name}.bias") if key in state]
        shapes = [weights[key].shape for key in keys if isinstance(weights.get(key), Tensor)]
        if any(shape[0] == num_classes for shape in shapes) or not weights.keys() & state.keys():
            continue
        if shapes:
            difference = f"{source} is for {shapes[0][0]} classes instead of {num_classes}"
        else:
            difference = f"{source} has no weights of the classifier"
        if not new_classifiers:
            raise TeamNetError(
                f"{difference}, and {name} would keep random weights, since the net is frozen: "
                "give weights that were trained on these classes, or leave it unfrozen."
            )
        logger.warning("%s: %s starts with new weights.", difference, name)
        adapted |= {key: state[key] for key in keys}
    return adapted


def _adapt_input_conv(in_channels: int, weight: Tensor) -> Tensor:
    from timm.models import adapt_input_conv

    adapted: Tensor = adapt_input_conv(in_channels, weight)
    return adapted


def _classifiers(
    backbone: nn.Module, num_classes: int
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that output one number for each class."""
    for name, module in backbone.named_modules():
        if (isinstance(module, nn.Linear) and module.out_features == num_classes) or (
            isinstance(module, nn.Conv2d) and module.out_channels == num_classes
        ):
            yield name, module

"""The preprocessing of images as plain values that a checkpoint can hold."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import Any

from torchvision.transforms import v2

from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust


@dataclass(frozen=True)
class PreprocessingConfig:
    """The preprocessing of images for validation, test and prediction.

    Attributes:
        input_shape: Shape of an input image of the net, (channels, height, width). Files are read
            as grey images for one channel, as RGB for three.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        transform: The transforms that bring an image to ``input_shape``, each as ``class_path`` and
            ``init_args``; None if they are not known.
        bits: Number of bits that hold values in files with 16 bits.

    Raises:
        TeamNetError: If a value is out of its range, or the number of means or standard deviations
            differs from that of the channels.
    """

    input_shape: list[int]
    mean: list[float]
    std: list[float]
    transform: list[dict[str, Any]] | None = field(default_factory=list)
    bits: int = 16

    def __post_init__(self) -> None:
        if self.transform is not None and not isinstance(self.transform, list):
            raise TeamNetError(f"transform must be a list or None, found {self.transform!r}.")
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise TeamNetError(
                "input_shape must be three positive numbers (channels, height, width), found "
                f"{self.input_shape}."
            )
        channels = self.input_shape[0]
        numbers = [*self.mean, *self.std]
        if not len(self.mean) == len(self.std) == channels or not all(map(math.isfinite, numbers)):
            raise TeamNetError(
                f"mean and std must have a value for each of {channels} channels, found "
                f"{self.mean} and {self.std}."
            )
        if min(self.std) <= 0:
            raise TeamNetError(f"std must be positive, found {self.std}.")
        if not 8 <= self.bits <= 16:
            raise TeamNetError(f"bits must be in 8..16, found {self.bits}.")

    def transforms(self, trust: Trust) -> list[v2.Transform]:
        """Makes the transforms.

        Args:
            trust: Decides whether transforms other than torchvision's may be made.

        Raises:
            TeamNetError: If the transforms are not known, or a transform is not trusted or cannot
                be made.
        """
        if self.transform is None:
            raise TeamNetError(
                f"{trust.source} does not hold the transforms of evaluation images, since they "
                "are not plain values. Make a Predictor with your own Preprocessing."
            )
        trust.check_transforms("preprocessing.transform", self.transform)
        try:
            transforms = [_make(transform) for transform in self.transform]
        except Exception as error:  # a constructor can raise errors of any class
            raise TeamNetError(f"{trust.source}: a transform cannot be made: {error!r}.") from error
        if not all(map(callable, transforms)):
            raise TeamNetError(f"{trust.source}: transforms must be callable, found {transforms}.")
        return transforms


def _make(value: Any) -> Any:
    if isinstance(value, Mapping):
        module, _, name = value["class_path"].rpartition(".")
        return getattr(import_module(module), name)(**_make_all(value.get("init_args", {})))
    return [_make(inner) for inner in value] if isinstance(value, list) else value


def _make_all(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _make(value) for name, value in arguments.items()}


def describe_transform(transform: object) -> dict[str, Any]:
    """Describes a transform as plain values.

    Args:
        transform: The transform, which has each argument of its constructor as an attribute of the
            same name, as all transforms of torchvision do.

    Returns:
        Its class as ``class_path`` and its arguments as ``init_args``.

    Raises:
        TeamNetError: If an argument is missing among the attributes, or is not a plain value.

    Examples:
        >>> describe_transform(v2.CenterCrop(8))
        {'class_path': 'torchvision.transforms.v2.CenterCrop', 'init_args': {'size': [8, 8]}}
    """
    kind = type(transform)
    arguments = {}
    for name in inspect.signature(kind).parameters:
        if not hasattr(transform, name):
            raise TeamNetError(
                f"{kind.__name__} does not keep its argument {name} as an attribute."
            )
        arguments[name] = _plain(getattr(transform, name), f"{kind.__name__}, argument {name}")
    return _described(transform, arguments)


def _described(value: object, arguments: dict[str, Any]) -> dict[str, Any]:
    kind = type(value)
    public = getattr(v2, kind.__name__, None) is kind
    module = "torchvision.transforms.v2" if public else kind.__module__
    return {"class_path": f"{module}.{kind.__qualname__}", "init_args": arguments}


def _plain(value: object, name: str) -> object:
    if isinstance(value, Enum):
        return _described(value, {"value": value.value})
    if isinstance(value, v2.Transform):
        return describe_transform(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner, name) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TeamNetError(f"{name} is not a plain value: {value!r}.")

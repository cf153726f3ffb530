"""From what a user has, files, arrays or tensors, to what a net takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from teamnet_pl.data.images import convert_image, read_image
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust

OneImage: TypeAlias = Tensor | npt.NDArray[Any] | Image.Image | str | Path | bytes
Images: TypeAlias = OneImage | Sequence[OneImage]
"""One image or several: tensors, arrays, PIL images, paths of image files, or their content.

A tensor has the shape ``(C, H, W)`` or ``(N, C, H, W)``, an array ``(H, W)``, ``(H, W, C)`` or
``(N, H, W, C)``. Both hold integers from 0 to 255 (uint8) or floats from 0 to 1.
"""

MAX_PIXELS = 2**24
"""Pixels that an image file may have, by default: those of 4096x4096."""


class Preprocessing:
    """Brings images to what a net was trained on.

    Args:
        input_shape: Shape of one image as the net takes it, ``(channels, height, width)``.
        mean: Mean of each channel over the training images, for pixels in [0, 1].
        std: Standard deviation, likewise.
        transforms: torchvision v2 transforms that bring an image to ``input_shape``.
        bits: Number of bits that hold values in files of 16 bits.

    Raises:
        ValueError: If an argument is out of its range, or mean and std do not have one value for
            each channel.

    Example:
        >>> preprocessing = Preprocessing((1, 8, 8), mean=[0.5], std=[0.5])
        >>> batch = preprocessing(np.full((8, 8), 255, dtype=np.uint8))
        >>> batch.shape, batch.unique()
        (torch.Size([1, 1, 8, 8]), tensor([1.]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        transforms: Sequence[v2.Transform] = (),
        bits: int = 16,
    ) -> None:
        PreprocessingConfig(list(input_shape), list(mean), list(std), bits=bits)  # checks them
        self.input_shape = tuple(input_shape)
        self.bits = bits
        self._each = v2.Compose([v2.ToImage(), *transforms])
        self._all = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    @classmethod
    def from_config(cls, config: PreprocessingConfig, trust: Trust) -> Preprocessing:
        """Makes the preprocessing that a file describes.

        Args:
            config: The description.
            trust: Whether transforms that are not torchvision's may be made.

        Raises:
            ValueError: If a transform is not to be trusted or cannot be made, or they are not
                known.
        """
        transforms = config.transforms(trust)
        return cls(config.input_shape, config.mean, config.std, transforms, config.bits)

    def __call__(self, images: Images, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Reads, transforms and normalises images.

        Args:
            images: One image or several, see `Images`.
            max_pixels: Files of larger images are refused before they are decoded.

        Returns:
            float32, shape ``(N, *input_shape)``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If there is no image, or one is none, or does not come to ``input_shape``.
        """
        batch = [self._one(image, max_pixels) for image in _split(images)]
        if not batch:
            raise TeamNetError("There must be at least one image, found none.")
        return torch.stack(batch)

    def _one(self, image: OneImage, max_pixels: int) -> Tensor:
        channels = self.input_shape[0]
        if isinstance(image, str | Path | bytes | Image.Image) and channels not in (1, 3):
            raise TeamNetError(f"The net takes {channels} channels: pass tensors or arrays.")
        if isinstance(image, str | Path):
            if not Path(image).is_file():
                raise FileNotFoundError(f"There is no file {image}.")
            image = read_image(str(image), Path(image), channels, self.bits, max_pixels)
        elif isinstance(image, bytes):
            image = read_image("The image", BytesIO(image), channels, self.bits, max_pixels)
        elif isinstance(image, Image.Image):
            image = convert_image(image, channels, self.bits)
        elif not isinstance(image, Tensor | np.ndarray):
            raise TeamNetError(
                "An image is a tensor, an array, a PIL image, the path of a file or its content, "
                f"found a {type(image).__name__}."
            )
        else:
            if isinstance(image, np.ndarray) and not image.flags.writeable:
                image = image.copy()  # torch takes no other; that of a PIL image is none
            _check_values(torch.as_tensor(image))
        tensor = self._each(image)
        if tuple(tensor.shape) != self.input_shape:
            raise TeamNetError(
                f"An image has the shape {tuple(tensor.shape)} (channels, height, width); the net "
                f"was trained on {self.input_shape}. Resize or crop it."
            )
        return self._all(tensor).as_subclass(Tensor)  # type: ignore[no-any-return]


def _split(images: Images) -> Iterator[OneImage]:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        for image in images:
            yield from _split(image)
    elif isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        yield from images
    elif isinstance(images, Tensor) and images.ndim != 3:
        raise TeamNetError(f"A tensor has 3 or 4 axes, found the shape {tuple(images.shape)}.")
    elif isinstance(images, np.ndarray) and images.ndim not in (2, 3):
        raise TeamNetError(f"An array has 2 to 4 axes, found the shape {images.shape}.")
    else:
        yield images


def _check_values(image: Tensor) -> None:
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):  # nor is it so for NaN
            raise TeamNetError(
                f"Floats must be in [0, 1], found {image.min():g} to {image.max():g}. Divide "
                "values up to 255 by 255; the net's mean and std are taken care of."
            )
    elif image.dtype != torch.uint8:
        raise TeamNetError(f"Integers must be uint8, found {image.dtype}.")

"""From what a user has, files, arrays or tensors, to what a net takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from teamnet_pl.data.images import upright

OneImage: TypeAlias = Tensor | npt.NDArray[Any] | Image.Image | str | Path
Images: TypeAlias = OneImage | Sequence[OneImage]
"""One image or several.

A tensor has the shape ``(C, H, W)`` or ``(N, C, H, W)``, an array ``(H, W)``, ``(H, W, C)`` or
``(N, H, W, C)``. Both hold integers from 0 to 255 (uint8) or floats from 0 to 1.
"""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats of image files that are read: Pillow knows others whose readers run other programs."""
MAX_PIXELS = 2**24
"""Pixels that an image file may have, by default: those of 4096x4096."""


def open_image(file: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file, of which nothing is trusted.

    Args:
        file: Its path, or what is in it.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, not all there, in a format other than `FORMATS`, or too
            large.
    """
    name = "The data" if isinstance(file, bytes) else str(file)
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        with Image.open(
            BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS
        ) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"it has {width}x{height} pixels, {max_pixels:,} are allowed")
            image.load()
            return image
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ValueError(f"{name} is no image in one of the formats {known}.") from error
    except Exception as error:  # whatever a decoder stumbles over
        raise ValueError(f"{name} cannot be read as an image: {error}.") from error


class Preprocessing:
    """Brings images to what a net was trained on.

    Args:
        input_shape: Shape of one image as the net takes it, ``(channels, height, width)``.
        mean: Mean of each channel over the training images, for pixels in [0, 1].
        std: Standard deviation, likewise.
        transforms: What brings an image to ``input_shape``, torchvision v2 transforms.

    Raises:
        ValueError: If mean or std do not have one value for each channel, or std one that is not
            positive.

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
    ) -> None:
        self.input_shape = tuple(input_shape)
        channels = self.input_shape[0]
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise ValueError(
                f"mean and std must have a value for each of {channels} channels, std a positive "
                f"one; found {list(mean)} and {list(std)}."
            )
        self._each = v2.Compose([v2.ToImage(), *transforms])
        self._all = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def __call__(self, images: Images) -> Tensor:
        """Reads, transforms and normalises images.

        Args:
            images: One image or several, see `Images`.

        Returns:
            float32, shape ``(N, *input_shape)``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If there is no image, or one is none, or does not come to ``input_shape``.
        """
        batch = [self._one(image) for image in _split(images)]
        if not batch:
            raise ValueError("There must be at least one image, found none.")
        return torch.stack(batch)

    def _one(self, image: OneImage) -> Tensor:
        if isinstance(image, str | Path):
            image = open_image(image)
        if isinstance(image, Image.Image):
            if (channels := self.input_shape[0]) not in (1, 3):
                raise ValueError(f"The net takes {channels} channels: pass tensors or arrays.")
            image = upright(image, channels)
        elif not isinstance(image, Tensor | np.ndarray):
            raise ValueError(
                "An image is a tensor, an array, a PIL image or the path of a file, found a "
                f"{type(image).__name__}."
            )
        else:
            if isinstance(image, np.ndarray) and not image.flags.writeable:
                image = image.copy()  # torch takes no other; that of a PIL image is none
            _check_values(torch.as_tensor(image))
        tensor = self._each(image)
        if tuple(tensor.shape) != self.input_shape:
            raise ValueError(
                f"An image has the shape {tuple(tensor.shape)} (channels, height, width); the net "
                f"was trained on {self.input_shape}. Resize or crop it."
            )
        return self._all(tensor).as_subclass(Tensor)  # type: ignore[no-any-return]


def _split(images: Images) -> Iterator[OneImage]:
    if isinstance(images, Sequence) and not isinstance(images, str):
        for image in images:
            yield from _split(image)
    elif isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        yield from images
    elif isinstance(images, Tensor) and images.ndim != 3:
        raise ValueError(f"A tensor has 3 or 4 axes, found the shape {tuple(images.shape)}.")
    elif isinstance(images, np.ndarray) and images.ndim not in (2, 3):
        raise ValueError(f"An array has 2 to 4 axes, found the shape {images.shape}.")
    else:
        yield images


def _check_values(image: Tensor) -> None:
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):  # nor is it so for NaN
            raise ValueError(
                f"Floats must be in [0, 1], found {image.min():g} to {image.max():g}. Divide "
                "values up to 255 by 255; the net's mean and std are taken care of."
            )
    elif image.dtype != torch.uint8:
        raise ValueError(f"Integers must be uint8, found {image.dtype}.")

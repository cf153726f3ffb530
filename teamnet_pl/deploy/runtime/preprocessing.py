"""Turns files, arrays, PIL images and tensors into the input of a net."""

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
"""One image or several: tensors, arrays, PIL images, paths of image files, or the files' content.

A tensor has the shape ``(C, H, W)`` or ``(N, C, H, W)``; an array has the shape ``(H, W)``,
``(H, W, C)`` or ``(N, H, W, C)``. Both hold integers from 0 to 255 (uint8) or floats from 0 to 1.
"""

MAX_PIXELS = 2**24
"""Largest number of pixels of an image file by default, that of 4096x4096."""


class Preprocessing:
    """Prepares images as in the training of a net.

    Args:
        input_shape: Shape of one image as the net takes it, ``(channels, height, width)``.
        mean: Mean of each channel over the training images, for pixels in [0, 1].
        std: Standard deviation of each channel, likewise.
        transforms: torchvision v2 transforms that bring an image to ``input_shape``.
        bits: Number of bits that are used in 16-bit image files.

    Attributes:
        input_shape: Shape of one image as the net takes it.
        bits: Number of bits that are used in 16-bit image files.

    Raises:
        TeamNetError: If an argument is out of range, or mean and std do not have one value for
            each channel.

    Examples:
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
        # Checks the arguments.
        PreprocessingConfig(list(input_shape), list(mean), list(std), bits=bits)
        self.input_shape = tuple(input_shape)
        self.bits = bits
        self._transform = v2.Compose([v2.ToImage(), *transforms])
        self._normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        )

    @classmethod
    def from_config(cls, config: PreprocessingConfig, trust: Trust) -> Preprocessing:
        """Makes the preprocessing that a file describes.

        Args:
            config: The description.
            trust: Whether the file may name transforms that are not torchvision's.

        Raises:
            TeamNetError: If a transform is not trusted or cannot be made, or the transforms are not
                known.
        """
        transforms = config.transforms(trust)
        return cls(config.input_shape, config.mean, config.std, transforms, config.bits)

    def __call__(self, images: Images, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Reads, transforms and normalizes images.

        Args:
            images: One image or several, see `Images`.
            max_pixels: Files with more pixels are refused before they are decoded.

        Returns:
            A float32 tensor of shape ``(N, *input_shape)``.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If there are no images, one of them is not an image, or one does not have
                the shape ``input_shape`` after the transforms.
        """
        batch = [self._prepare(image, max_pixels) for image in _split(images)]
        if not batch:
            raise TeamNetError("There must be at least one image, found none.")
        return torch.stack(batch)

    def _prepare(self, image: OneImage, max_pixels: int) -> Tensor:
        tensor = self._transform(self._decode(image, max_pixels))
        if tuple(tensor.shape) != self.input_shape:
            name = image if isinstance(image, str | Path) else "An image"
            raise TeamNetError(
                f"{name} has the shape {tuple(tensor.shape)} (channels, height, width); the net "
                f"was trained on {self.input_shape}. Resize or crop it."
            )
        return self._normalize(tensor).as_subclass(Tensor)  # type: ignore[no-any-return]

    def _decode(self, image: OneImage, max_pixels: int) -> Tensor | npt.NDArray[Any] | Image.Image:
        """Decodes a file; checks the values of an array or tensor."""
        channels = self.input_shape[0]
        if isinstance(image, str | Path | bytes | Image.Image) and channels not in (1, 3):
            raise TeamNetError(f"The net takes {channels} channels: pass tensors or arrays.")
        if isinstance(image, str | Path):
            if not Path(image).is_file():
                raise FileNotFoundError(f"There is no file {image}.")
            return read_image(str(image), Path(image), channels, self.bits, max_pixels)
        if isinstance(image, bytes):
            return read_image("The image", BytesIO(image), channels, self.bits, max_pixels)
        if isinstance(image, Image.Image):
            return convert_image(image, channels, self.bits)
        if not isinstance(image, Tensor | np.ndarray):
            raise TeamNetError(
                "An image is a tensor, an array, a PIL image, the path of a file or its content; "
                f"found a {type(image).__name__}."
            )
        if isinstance(image, np.ndarray) and not image.flags.writeable:
            image = image.copy()  # torch refuses read-only arrays, such as those of PIL images
        _check_values(torch.as_tensor(image))
        return image


def _split(images: Images) -> Iterator[OneImage]:
    """Yields the images of a sequence or a batch one by one."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        for image in images:
            yield from _split(image)
    elif isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        yield from images
    elif isinstance(images, Tensor) and images.ndim != 3:
        raise TeamNetError(
            f"A tensor must have 3 or 4 axes, found the shape {tuple(images.shape)}."
        )
    elif isinstance(images, np.ndarray) and images.ndim not in (2, 3):
        raise TeamNetError(f"An array must have 2 to 4 axes, found the shape {images.shape}.")
    else:
        yield images


def _check_values(image: Tensor) -> None:
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):  # also true for NaN
            raise TeamNetError(
                f"Floats must be in [0, 1], found {image.min():g} to {image.max():g}. Divide "
                "values up to 255 by 255; do not subtract the mean or divide by std yourself."
            )
    elif image.dtype != torch.uint8:
        raise TeamNetError(f"Integers must be uint8, found {image.dtype}.")

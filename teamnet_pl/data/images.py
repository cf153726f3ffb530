"""Encoded images (JPEG, PNG and other formats that Pillow reads): decoding and datasets."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from teamnet_pl.data.loading import UnreadableImageError
from teamnet_pl.errors import TeamNetError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The image formats that are read. Pillow knows others whose readers run other programs."""

_GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N"}
_SURVEYED = 100
_EXIF_ORIENTATION = 0x0112


class EncodedImages(Dataset[tuple[Image.Image, int]]):
    """Encoded images, each decoded as it is read.

    Args:
        labels: Class of each image, shape (N,).
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each image must have; ``None`` if sizes may differ.

    Attributes:
        bits: Number of bits that hold values in images with 16 bits.
    """

    bits = 16

    def __init__(
        self, labels: npt.ArrayLike, channels: int, size: tuple[int, int] | None = None
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.channels = channels
        self.size = size

    @abstractmethod
    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """Returns the name of an image, for messages, and its file or bytes."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image and its label.

        Raises:
            UnreadableImageError: If the image cannot be read or has a wrong size.
        """
        name, source = self.source(index)
        image = read_image(name, source, self.channels, self.bits)
        check_size(name, (image.height, image.width), self.size)
        return image, int(self.labels[index])


class ImageFiles(EncodedImages):
    """Images in files.

    Args:
        paths: The files.
        labels: Class of each image, shape (N,).
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each image must have; ``None`` if sizes may differ.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: npt.ArrayLike,
        channels: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(labels, channels, size)
        # One block of memory: the reference counts of a list's elements would make each worker
        # process copy the list page by page.
        self.paths = np.array([os.fsencode(path) for path in paths])

    def source(self, index: int) -> tuple[str, Path]:
        """Returns the path of an image, as text and as `Path`."""
        path = os.fsdecode(self.paths[index])
        return path, Path(path)


def check_size(name: str, size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Refuses an image whose size differs from that of the others.

    Args:
        name: Name of the image, for the message.
        size: Its height and width.
        expected: Height and width of all images; ``None`` if sizes may differ.

    Raises:
        UnreadableImageError: If the sizes differ.
    """
    if expected not in (None, size):
        raise UnreadableImageError(
            f"{name} has {size[0]}x{size[1]} pixels, the others {expected[0]}x{expected[1]}. "
            "Set image_size, or scale it."
        )


def read_image(
    name: str,
    source: Path | BytesIO,
    channels: int,
    bits: int = 16,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decodes an image and converts it with `convert_image`, for training and prediction alike.

    Args:
        name: Name of the image, for the message.
        source: Its file or bytes, which are not trusted.
        channels: 3 for RGB, 1 for grey.
        bits: Number of bits that hold values in an image with 16 bits.
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        An image of mode RGB or L.

    Raises:
        UnreadableImageError: If the image is corrupt, truncated or too large, has 32-bit values, or
            is not in one of the `FORMATS`.
    """
    try:
        with Image.open(source, formats=FORMATS) as opened:
            width, height = opened.size
            if max_pixels is not None and width * height > max_pixels:
                raise TeamNetError(f"it has {width}x{height} pixels, {max_pixels:,} are allowed")
            return convert_image(opened, channels, bits)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name}: not an image in one of the formats {', '.join(FORMATS)}."
        ) from error
    except Exception as error:  # Pillow's plugins raise errors of any class
        raise UnreadableImageError(f"{name}: {error}") from error


def convert_image(image: Image.Image, channels: int, bits: int = 16) -> Image.Image:
    """Converts an image to 8 bits per channel, for training and prediction alike.

    The image is turned by its EXIF orientation, converted between color and grey (from CMYK and
    palettes too), and loses its transparency. Of 16 bits, the upper 8 of those that hold values are
    kept.

    Args:
        image: An image of any mode.
        channels: 3 for RGB, 1 for grey.
        bits: Number of bits that hold values in an image with 16 bits, such as 12 for a camera.

    Returns:
        An image of mode RGB or L.

    Raises:
        TeamNetError: If the image has 32-bit values, or a value that takes more than ``bits``.
    """
    _check_mode(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if (largest := int(values.max())) >= 2**bits:
            raise TeamNetError(
                f"an image has the value {largest}, which takes more than {bits} bits: set bits to "
                "the number of bits that hold values in all images"
            )
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.mode == "P":  # Pillow warns of transparency in palettes unless RGBA comes between
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _check_mode(image: Image.Image) -> None:
    sixteen_bits = image.mode == "I" and image.format == "PNG"  # older versions of Pillow
    if image.mode == "F" or (image.mode == "I" and not sixteen_bits):
        raise TeamNetError(
            f"an image has 32 bits per pixel (Pillow's mode {image.mode}), whose range is not "
            "known. Convert it to 8 or 16 bits."
        )


SAMPLED_FOR_BITS = 16
"""Number of images that tell the bits of a dataset too large for a survey."""


def largest_value(sources: Iterable[Path | BytesIO]) -> int | None:
    """Finds the largest value in images with 16 bits.

    Args:
        sources: Files or bytes of images. Unreadable images and those with 8 bits do not count.

    Returns:
        The value; ``None`` without such an image.
    """
    values = map(_sixteen_bit_maximum, sources)
    return max((value for value in values if value is not None), default=None)


def _sixteen_bit_maximum(source: Path | BytesIO) -> int | None:
    try:
        with Image.open(source, formats=FORMATS) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # raised again when the image is read
        return None


def bits_needed(largest: int | None) -> int:
    """Computes the number of bits that hold values, among those of cameras and scanners.

    Args:
        largest: The largest value of images with 16 bits; ``None`` without such images.

    Examples:
        >>> [bits_needed(largest) for largest in (None, 200, 1023, 1024, 4095, 9000, 60000)]
        [16, 8, 10, 12, 12, 14, 16]
    """
    if largest is None:
        return 16
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)


class Survey(NamedTuple):
    """Common properties of some images of a dataset.

    Attributes:
        channels: 1 if all images are grey, otherwise 3.
        sizes: Heights and widths.
        largest: Largest value of the images with 16 bits; ``None`` without such images.
    """

    channels: int
    sizes: set[tuple[int, int]]
    largest: int | None


def survey(images: EncodedImages, on_error: str) -> Survey:
    """Opens up to 100 images, evenly spread; only images with 16 bits are decoded.

    Args:
        images: The images.
        on_error: "skip" to pass over unreadable images.

    Raises:
        UnreadableImageError: If a file is not an image, or an image has 32-bit values. With "skip",
            only if this is true of all.
    """
    all_grey, sizes, problem = True, set(), None
    values: list[int] = []
    count = min(len(images), _SURVEYED)
    for index in np.linspace(0, len(images) - 1, count).round().astype(int).tolist():
        name, source = images.source(index)
        try:
            with Image.open(source, formats=FORMATS) as image:
                _check_mode(image)
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
                size = (image.width, image.height) if turned else (image.height, image.width)
                check_size(name, size, images.size)
                sizes.add(size)
                all_grey &= image.mode in _GREY or image.mode == "I"
                if image.mode.startswith("I"):
                    values.append(int(np.asarray(image).max()))
        except Exception as error:
            problem = (
                error
                if isinstance(error, UnreadableImageError)
                else UnreadableImageError(f"{name}: {error}")
            )
            if on_error == "raise":
                raise problem from error
    if problem and not sizes:
        raise problem
    return Survey(1 if all_grey else 3, sizes, max(values, default=None))

"""Encoded images: JPEG, PNG and whatever else Pillow reads."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from teamnet_pl.data.base import ImageDataModule, Split
from teamnet_pl.data.loading import Skipped, TransformedSubset, UnreadableImageError
from teamnet_pl.errors import TeamNetError

# Of ImageNet's training images; torchvision's and timm's weights are trained with these.
_IMAGENET: tuple[Sequence[float], Sequence[float]] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N"}
_SURVEYED = 100


@dataclass
class Statistics:
    """What to normalise by, for pixels in [0, 1].

    Attributes:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    mean: list[float]
    std: list[float]


class EncodedImages(Dataset[tuple[Image.Image, int]]):
    """Encoded images, each decoded as it is read.

    Args:
        labels: Class of each, shape (N,).
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each must have; ``None`` if they may differ.

    Attributes:
        bits: How many bits of images with 16 hold values.
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
        """The image's name, for messages, and where its bytes are."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image and its label; raises `UnreadableImageError`."""
        name, source = self.source(index)
        image = read_image(name, source, self.channels, self.bits)
        check_size(name, (image.height, image.width), self.size)
        return image, int(self.labels[index])


class ImageFiles(EncodedImages):
    """Images in files.

    Args:
        paths: The files.
        labels: Class of each.
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each must have; ``None`` if they may differ.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: npt.ArrayLike,
        channels: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(labels, channels, size)
        # One block of memory: worker processes would copy a list piece by piece, by counting
        # references to what is in it.
        self.paths = np.array([os.fsencode(path) for path in paths])

    def source(self, index: int) -> tuple[str, Path]:
        """The path, as text and as such."""
        path = os.fsdecode(self.paths[index])
        return path, Path(path)


def check_size(name: str, size: tuple[int, int], others: tuple[int, int] | None) -> None:
    """Refuses an image of another size than all have.

    Args:
        name: What to call it in an error.
        size: Its height and width.
        others: Those of all images; ``None`` if they may differ.

    Raises:
        UnreadableImageError: They differ.
    """
    if others not in (None, size):
        raise UnreadableImageError(
            f"{name} has {size[0]}x{size[1]} pixels, the others {others[0]}x{others[1]}. "
            "Set image_size, or scale it."
        )


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats of image files that are read: Pillow knows others whose readers run other programs."""


def read_image(
    name: str,
    source: Path | BytesIO,
    channels: int,
    bits: int = 16,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decodes an image as :func:`upright` has it, the same to train and to predict.

    Args:
        name: What to call it in an error.
        source: Its file or bytes, of which nothing is trusted.
        channels: 3 for RGB, 1 for grey.
        bits: How many bits of an image with 16 hold values.
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        An image of mode RGB or L.

    Raises:
        UnreadableImageError: It is corrupt, truncated, too large, of 32-bit values, or not an image
            in one of `FORMATS`.
    """
    try:
        with Image.open(source, formats=FORMATS) as opened:
            width, height = opened.size
            if max_pixels is not None and width * height > max_pixels:
                raise TeamNetError(f"it has {width}x{height} pixels, {max_pixels:,} are allowed")
            return upright(opened, channels, bits)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name}: not an image in one of the formats {', '.join(FORMATS)}."
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever comes to them
        raise UnreadableImageError(f"{name}: {error}") from error


def upright(image: Image.Image, channels: int, bits: int = 16) -> Image.Image:
    """Brings an image to 8 bits in each of the wanted channels, the same to train and to predict.

    It is turned as its EXIF orientation says, colour becomes grey or grey colour (CMYK and palettes
    too), transparency is left out, and of 16 bits the upper 8 of those that hold values are kept.

    Args:
        image: Of any mode.
        channels: 3 for RGB, 1 for grey.
        bits: How many bits of an image with 16 hold values, such as 12 of a camera's.

    Returns:
        An image of mode RGB or L.

    Raises:
        ValueError: It is of 32-bit values, or has a value that takes more bits.
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
    if image.mode == "P":  # Pillow warns of transparency in palettes that doesn't go by RGBA
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _check_mode(image: Image.Image) -> None:
    sixteen_bits = image.mode == "I" and image.format == "PNG"  # older versions of Pillow
    if image.mode == "F" or (image.mode == "I" and not sixteen_bits):
        raise TeamNetError(
            f"an image has 32 bits a pixel (Pillow's mode {image.mode}), of which the range isn't "
            "known. Convert it to 8 or 16 bits."
        )


def largest_value(source: Path | BytesIO) -> int | None:
    """The largest value of an image with 16 bits; ``None`` for others and unreadable ones."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # which is raised when the image is read
        return None


def bits_for(largest: int | None) -> int:
    """How many bits hold values up to the largest one, of those that cameras and scanners have.

    Args:
        largest: The largest value of images with 16 bits; ``None`` without such images.

    Example:
        >>> [bits_for(largest) for largest in (None, 200, 1023, 1024, 4095, 9000, 60000)]
        [16, 8, 10, 12, 12, 14, 16]
    """
    if largest is None:
        return 16
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)


class Survey(NamedTuple):
    """What some images of a dataset have in common.

    Attributes:
        channels: 1 if all are grey, else 3.
        sizes: Heights and widths.
        largest: Largest value of those with 16 bits; ``None`` without such images.
    """

    channels: int
    sizes: set[tuple[int, int]]
    largest: int | None


def survey(images: EncodedImages, on_error: str) -> Survey:
    """Opens up to 100 images, evenly spread; only those with 16 bits are decoded.

    Args:
        images: What to look at.
        on_error: "skip" to pass over unreadable ones.

    Raises:
        UnreadableImageError: One is not an image or of 32-bit values, or all are.
    """
    grey, sizes, problem = True, set(), None
    values: list[int] = []
    count = min(len(images), _SURVEYED)
    for index in np.linspace(0, len(images) - 1, count).round().astype(int).tolist():
        name, source = images.source(index)
        try:
            with Image.open(source, formats=FORMATS) as image:
                _check_mode(image)
                turned = image.getexif().get(0x0112, 1) >= 5
                size = (image.width, image.height) if turned else (image.height, image.width)
                check_size(name, size, images.size)
                sizes.add(size)
                grey &= image.mode in _GREY or (image.mode == "I")
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
    return Survey(1 if grey else 3, sizes, max(values, default=None))


class EncodedImageDataModule(ImageDataModule):
    """Base of the datasets of encoded images, which may differ in size, mode and health.

    The standard recipe at a given image size is ImageNet's (Goyal et al. 2017, arXiv:1706.02677): a
    random crop of 8 to 100 % of the area, scaled to that size, and a horizontal flip; for
    evaluation the middle of the image, scaled such that 7/8 of its shorter side remain. Images that
    all have one size keep it: there the recipe is CIFAR's (He et al. 2016, arXiv:1512.03385), a
    random crop after padding by 1/8 of the side, and a horizontal flip.

    Args:
        image_size: Height and width in pixels that images are brought to; ``None`` for that of the
            images, which must all be alike.
        statistics: What to normalise by: "imagenet", "data" to measure up to 1000 training images,
            or mean and standard deviation of each channel.
        bits: How many bits of images with 16 hold values, such as 12; ``None`` to find out from the
            training images. A value that takes more is an error.
        on_error: What to do about an image that can't be read: "raise" an error that names it, or
            "skip" it. In training the next one stands in for it, in validation and test it is left
            out, and ``predict`` raises in any case, as it has to answer for each image. At the end
            those skipped are counted and listed.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Attributes:
        min_area: Least share of an image's area in the standard recipe's crops.

    Raises:
        ValueError: An argument is out of its range; in ``setup`` or later, an image can't be read.
    """

    mean, std = _IMAGENET
    min_area = 0.08

    def __init__(
        self,
        *,
        image_size: int | None,
        statistics: Literal["imagenet", "data"] | Statistics = "imagenet",
        bits: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size is not None and image_size < 1:
            raise TeamNetError(f"image_size must be at least 1, got {image_size}.")
        if bits is not None and not 8 <= bits <= 16:
            raise TeamNetError(f"bits must be in 8..16, got {bits}.")
        self.given_bits = bits
        self.bits = bits or 16
        self.image_size = image_size
        self.statistics = statistics
        if isinstance(statistics, Statistics):
            self.mean, self.std = statistics.mean, statistics.std
        self.on_error = on_error

    def shape_from(self, images: EncodedImages) -> None:
        """Sets ``input_shape`` to what some of the images have in common.

        Args:
            images: The training images.

        Raises:
            ValueError: They differ in size, and there is no image size to bring them to.
        """
        channels, sizes, largest = survey(images, self.on_error)
        self.find_bits(largest)
        if self.image_size is not None:
            sizes = {(self.image_size, self.image_size)}
        if len(sizes) > 1:
            examples = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise TeamNetError(
                f"{type(self).__name__}: images differ in size ({examples}, ...): set image_size."
            )
        self.input_shape = (channels, *sizes.pop())
        if self.statistics != "data":
            self.set_statistics(None)

    def find_bits(self, largest: int | None) -> None:
        """Sets ``bits`` to what training images have, unless they are given.

        Args:
            largest: The largest value of those with 16 bits; ``None`` without such images.
        """
        if self.given_bits is not None or largest is None:
            return
        self.bits = bits_for(largest)
        if self.bits < 16:
            rank_zero_warn(
                f"{type(self).__name__}: images with 16 bits hold values up to {largest}, so that "
                f"{self.bits} bits are taken for the whole range. If that is wrong, set bits."
            )

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width that the images must have; ``None`` if they are brought to them."""
        return self.input_shape[1:] if self.image_size is None else None

    def default_train_transform(self) -> list[v2.Transform]:
        """Random crop, and horizontal flip."""
        size = list(self.input_shape[1:])
        if self.image_size is not None:
            crop = v2.RandomResizedCrop(size, scale=(self.min_area, 1))
        else:
            crop = v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8])
        return [crop, v2.RandomHorizontalFlip()]

    def eval_transform(self) -> list[v2.Transform]:
        """The middle of the image, or all of it where all have one size."""
        if self.image_size is None:
            return []
        return [v2.Resize(round(self.image_size * 8 / 7)), v2.CenterCrop(self.image_size)]

    def setup(self, stage: str) -> None:
        """Load and split what the stage needs (Lightning's hook)."""
        self.skipped = Skipped() if self.on_error == "skip" else None
        super().setup(stage)
        images = None
        if self.statistics == "data":
            in_use = stage in ("fit", "validate")
            images = self.train_set.dataset if in_use else self._load_checked("train")[0]
        self.set_statistics(images)

    def set_statistics(self, images: Dataset[Any] | None) -> None:
        """Sets ``mean`` and ``std``.

        Args:
            images: Training images to measure; ``None`` if they are known.

        Raises:
            ValueError: They were given for another number of channels.
        """
        channels = self.input_shape[0]
        if images is not None:
            self.mean, self.std = self._measured(images)
        elif self.statistics == "imagenet" and channels == 1:
            self.mean, self.std = ((sum(values) / 3,) for values in _IMAGENET)
        for name in ("mean", "std"):
            if (values := len(getattr(self, name))) != channels:
                raise TeamNetError(
                    f"statistics.{name} must have a value for each of {channels} channels, "
                    f"got {values}."
                )

    def teardown(self, stage: str) -> None:
        """Counts and lists the images that were skipped (Lightning's hook)."""
        if self.skipped and (problems := self.skipped.pop()):
            warnings.warn(
                f"{type(self).__name__}: {len(problems)} images could not be read and were "
                "skipped:\n" + "\n".join(problems),
                stacklevel=2,
            )

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches; an image that can't be read is an error."""
        whole = TransformedSubset(
            self.test_set.dataset, self.test_set.indices, self.test_set.transform
        )
        return self._evaluation_loader(whole, even=False)

    def _load_checked(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        dataset, labels = super()._load_checked(split)
        images = cast(EncodedImages, dataset)
        images.bits = self.bits
        survey(images, self.on_error)
        return dataset, labels

    def _measured(self, images: Dataset[Any]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over up to 1000 images, evenly spread."""
        count = len(images)  # type: ignore[arg-type]
        chosen = np.linspace(0, count - 1, min(count, 1000)).round().astype(np.int64)
        transform = v2.Compose([v2.ToImage(), *self.eval_transform()])
        subset = TransformedSubset(images, chosen, transform, self.skipped)
        sums = squares = torch.zeros(self.input_shape[0], dtype=torch.float64)
        pixels = 0
        for sample in map(subset.__getitem__, range(len(subset))):
            if sample is not None:
                values = v2.functional.to_dtype(sample[0], torch.float64, scale=True).flatten(1)
                sums = sums + values.sum(1)
                squares = squares + values.square().sum(1)
                pixels += values.shape[1]
        mean = sums / pixels
        return mean.tolist(), (squares / pixels - mean**2).sqrt().tolist()

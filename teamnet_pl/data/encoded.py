"""The bases of the data modules of encoded images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from teamnet_pl.data.base import ImageDataModule, Split
from teamnet_pl.data.images import EncodedImages, bits_needed, survey
from teamnet_pl.data.loading import SkippedImages, TransformedSubset
from teamnet_pl.data.splits import SplitDataModule
from teamnet_pl.errors import TeamNetError

# Of ImageNet's training images; torchvision's and timm's weights are trained with these.
_IMAGENET: tuple[Sequence[float], Sequence[float]] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEASURED = 1000


@dataclass
class Statistics:
    """Mean and standard deviation for normalization, for pixels in [0, 1].

    Attributes:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    mean: list[float]
    std: list[float]


class EncodedImageDataModule(ImageDataModule):
    """Base of the datasets of encoded images, which may differ in size and mode or be broken.

    The standard recipe for a given image size is that of ImageNet (Goyal et al. 2017,
    arXiv:1706.02677): a random crop of 8 to 100 % of the area, scaled to the image size, and a
    horizontal flip; for evaluation, the center of the image, scaled such that 7/8 of its shorter
    side remain. Images that all have the same size keep it: their recipe is that of CIFAR (He et
    al. 2016, arXiv:1512.03385), a random crop after padding by 1/8 of the side, and a horizontal
    flip.

    Args:
        image_size: Height and width in pixels that images are brought to; ``None`` to keep the size
            of the images, which must all have the same.
        statistics: Mean and standard deviation for normalization: "imagenet", "data" to measure up
            to 1000 training images, or values for each channel.
        bits: Number of bits that hold values in images with 16 bits, such as 12; ``None`` to detect
            it from the training images. A value that takes more bits is an error.
        on_error: What to do about an image that cannot be read: "raise" an error with its name, or
            "skip" it. In training, the next image takes its place; in validation and test, it is
            left out; ``predict`` raises in any case, since it has to answer for each image. At the
            end, the skipped images are counted and listed.
        **kwargs: Arguments of `ImageDataModule`.

    Attributes:
        min_area: Least share of the area of an image in the crops of the standard recipe.

    Raises:
        TeamNetError: If an argument is out of its range, or, in ``setup`` or later, an image cannot
            be read.
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
            raise TeamNetError(f"image_size must be at least 1, found {image_size}.")
        if bits is not None and not 8 <= bits <= 16:
            raise TeamNetError(f"bits must be in 8..16, found {bits}.")
        self.given_bits = bits
        self.bits = bits or 16
        self.image_size = image_size
        self.statistics = statistics
        if isinstance(statistics, Statistics):
            self.mean, self.std = statistics.mean, statistics.std
        self.on_error = on_error

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width that the images must have; ``None`` if they are brought to a size."""
        return self.input_shape[1:] if self.image_size is None else None

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns a random crop and a horizontal flip."""
        size = list(self.input_shape[1:])
        if self.image_size is not None:
            crop = v2.RandomResizedCrop(size, scale=(self.min_area, 1))
        else:
            crop = v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8])
        return [crop, v2.RandomHorizontalFlip()]

    def eval_transform(self) -> list[v2.Transform]:
        """Returns a center crop; nothing for images that keep their size."""
        if self.image_size is None:
            return []
        return [v2.Resize(round(self.image_size * 8 / 7)), v2.CenterCrop(self.image_size)]

    def setup(self, stage: str) -> None:
        """Begins a record of skipped images, and sets known statistics (Lightning's hook)."""
        self.skipped = SkippedImages() if self.on_error == "skip" else None
        super().setup(stage)
        self.set_known_statistics()

    def teardown(self, stage: str) -> None:
        """Counts and lists the images that were skipped (Lightning's hook)."""
        if self.skipped and (messages := self.skipped.pop()):
            warnings.warn(
                f"{type(self).__name__}: {len(messages)} images could not be read and were "
                "skipped:\n" + "\n".join(messages),
                stacklevel=2,
            )

    def set_classes(self, num_classes: int, classes: Sequence[str] | None) -> None:
        """Sets the classes of a dataset that does not name them itself.

        Args:
            num_classes: Number of classes.
            classes: Names of the classes in the order of the labels; None if classes only have
                numbers.

        Raises:
            TeamNetError: If the number of names is not that of the classes.
        """
        if classes is not None and len(classes) != num_classes:
            raise TeamNetError(
                f"classes must have a name for each of {num_classes} classes, found {len(classes)}."
            )
        self.num_classes = num_classes
        self.classes = classes

    def detect_bits(self, largest: int | None) -> None:
        """Sets ``bits`` to those of the training images, unless the user has set them.

        Args:
            largest: The largest value of training images with 16 bits; ``None`` without such
                images.
        """
        if self.given_bits is not None or largest is None:
            return
        self.bits = bits_needed(largest)
        if self.bits < 16:
            rank_zero_warn(
                f"{type(self).__name__}: images with 16 bits hold values up to {largest}, so "
                f"{self.bits} bits are taken for the whole range. If that is wrong, set bits."
            )

    def set_known_statistics(self) -> None:
        """Sets ``mean`` and ``std`` unless they are to be measured.

        Raises:
            TeamNetError: If they were given for another number of channels.
        """
        channels = self.input_shape[0]
        if self.statistics == "data":
            return
        if self.statistics == "imagenet" and channels == 1:
            self.mean, self.std = ((sum(values) / 3,) for values in _IMAGENET)
        for name in ("mean", "std"):
            if (values := len(getattr(self, name))) != channels:
                raise TeamNetError(
                    f"statistics.{name} must have a value for each of {channels} channels, "
                    f"found {values}."
                )

    def measure_statistics(self, images: Dataset[Any]) -> None:
        """Sets ``mean`` and ``std`` to those of up to 1000 images, evenly spread.

        Args:
            images: The training images.
        """
        count = len(images)  # type: ignore[arg-type]
        indices = np.linspace(0, count - 1, min(count, _MEASURED)).round().astype(np.int64)
        subset = TransformedSubset(images, indices, self._eval_pipeline(), self.skipped)
        sums = squares = torch.zeros(self.input_shape[0], dtype=torch.float64)
        pixels = 0
        for sample in map(subset.__getitem__, range(len(subset))):
            if sample is not None:
                values = v2.functional.to_dtype(sample[0], torch.float64, scale=True).flatten(1)
                sums = sums + values.sum(1)
                squares = squares + values.square().sum(1)
                pixels += values.shape[1]
        mean = sums / pixels
        self.mean = mean.tolist()
        self.std = (squares / pixels - mean**2).sqrt().tolist()


class EncodedSplitDataModule(EncodedImageDataModule, SplitDataModule):
    """Base of the datasets of encoded images that are loaded split by split.

    `load_split` returns `EncodedImages`. Up to 100 of them are opened before training starts.

    Args:
        **kwargs: Arguments of `EncodedImageDataModule` and `SplitDataModule`.

    Raises:
        TeamNetError: If an argument is out of its range, or, in ``setup`` or later, an image cannot
            be read.
    """

    def infer_shape(self, images: EncodedImages) -> None:
        """Sets ``input_shape`` to the channels and the size of some of the images.

        Args:
            images: The training images.

        Raises:
            TeamNetError: If the images differ in size and no image size is set.
        """
        channels, sizes, largest = survey(images, self.on_error)
        self.detect_bits(largest)
        if self.image_size is not None:
            sizes = {(self.image_size, self.image_size)}
        if len(sizes) > 1:
            examples = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise TeamNetError(
                f"{type(self).__name__}: images differ in size ({examples}, ...): set image_size."
            )
        self.input_shape = (channels, *sizes.pop())
        self.set_known_statistics()

    def setup(self, stage: str) -> None:
        """Loads the splits that the stage needs, and measures statistics (Lightning's hook)."""
        super().setup(stage)
        if self.statistics == "data":
            self.measure_statistics(self.training_dataset(stage))

    def _load_checked(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        dataset, labels = super()._load_checked(split)
        images = cast(EncodedImages, dataset)
        images.bits = self.bits
        survey(images, self.on_error)
        return dataset, labels

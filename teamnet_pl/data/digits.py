"""Handwritten digits of 8x8 pixels from scikit-learn."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from teamnet_pl.data.base import Split
from teamnet_pl.data.splits import SplitDataModule, check_fraction, stratified_split
from teamnet_pl.errors import TeamNetError

_SIZE = 8
_TEST_SPLIT_SEED = 0


class Digits(SplitDataModule):
    """The 1797 8x8 digits of `sklearn.datasets.load_digits`, 10 classes, no download.

    Source: the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
    UCI Machine Learning Repository, doi:10.24432/C50P49). It has no official test split: here, one
    is held out, stratified by label, the same for every ``split_seed``.

    The standard augmentation is a random rotation of up to 10 degrees, a shift of up to 1/8 of the
    side (one of the 8 pixels) and a change of scale of up to 10 %.

    Args:
        image_size: Height and width in pixels; above 8, the images are enlarged bilinearly, for
            nets that downsample a lot. ``mean`` and ``std`` remain those of the 8x8 images.
        test_fraction: Share of the images in the test split.
        **kwargs: Arguments of `SplitDataModule`.

    Raises:
        TeamNetError: If an argument is out of its range.
    """

    num_classes = 10
    mean = (0.3053,)
    std = (0.3760,)

    def __init__(
        self, *, image_size: int = _SIZE, test_fraction: float = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if image_size < _SIZE:
            raise TeamNetError(f"image_size must be at least {_SIZE}, found {image_size}.")
        check_fraction("test_fraction", test_fraction)
        self.image_size = image_size
        self.test_fraction = test_fraction
        self.input_shape = (1, image_size, image_size)

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns small rotations, shifts and changes of scale; flips would change digits."""
        return [
            v2.RandomAffine(
                degrees=10,
                translate=(1 / _SIZE, 1 / _SIZE),
                scale=(0.9, 1.1),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        ]

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Loads a split.

        Args:
            split: "train" or "test".

        Returns:
            The images, float32 (1, image_size, image_size) in [0, 1], with their labels; and the
            labels.
        """
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        train, test = stratified_split(
            labels, "test_fraction", self.test_fraction, _TEST_SPLIT_SEED
        )
        indices = train if split == "train" else test
        images = torch.tensor(pixels[indices] / 16, dtype=torch.float32)
        images = v2.functional.resize(
            images.view(-1, 1, _SIZE, _SIZE), [self.image_size, self.image_size]
        )
        return TensorDataset(images, torch.from_numpy(labels[indices])), labels[indices]

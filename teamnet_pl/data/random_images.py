"""Images of noise, for smoke tests and speed measurements."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, TensorDataset

from teamnet_pl.data.base import Split
from teamnet_pl.data.splits import SplitDataModule
from teamnet_pl.errors import TeamNetError


class RandomImages(SplitDataModule):
    """Noise of any shape in any number of classes, for smoke tests and speed measurements.

    Args:
        num_classes: Number of classes.
        input_shape: (channels, height, width).
        train_images: Number of images in the training split, including those for validation.
        test_images: Number of images in the test split.
        **kwargs: Arguments of `SplitDataModule`.

    Raises:
        TeamNetError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        train_images: int = 1000,
        test_images: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"train_images": train_images, "test_images": test_images}
        sizes |= zip(("channels", "height", "width"), input_shape, strict=True)
        for name, size in sizes.items():
            if size < 1:
                raise TeamNetError(f"{name} must be at least 1, found {size}.")
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.images = {"train": train_images, "test": test_images}
        # Mean and standard deviation of the uniform distribution.
        self.mean = (0.5,) * input_shape[0]
        self.std = (12**-0.5,) * input_shape[0]

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Draws a split, the same in each run.

        Args:
            split: "train" or "test".

        Returns:
            The images, uint8, with their labels; and the labels, which cycle through the classes.
        """
        count = self.images[split]
        random = np.random.default_rng(split == "train")
        pixels = random.integers(256, size=(count, *self.input_shape), dtype=np.uint8)
        labels = np.arange(count) % self.num_classes
        return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels)), labels

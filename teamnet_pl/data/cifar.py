"""Small color images of 32x32 pixels: CIFAR-10, CIFAR-100 and SVHN."""

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from teamnet_pl.data.base import Split
from teamnet_pl.data.downloads import SmallImages
from teamnet_pl.errors import TeamNetError


class SmallPhotos(SmallImages):
    """Base of the datasets of 32x32 photos that torchvision reads.

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    stored_shape = (3, 32, 32)

    @abstractmethod
    def read(self, split: Split) -> tuple[npt.NDArray[np.uint8], npt.ArrayLike]:
        """Reads a split.

        Returns:
            Images (N, 3, 32, 32) and labels.

        Raises:
            RuntimeError: If a checksum is wrong.
        """

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Loads a split.

        Args:
            split: "train" or "test".

        Returns:
            The images, uint8 (3, 32, 32), with their labels; and the labels.

        Raises:
            FileNotFoundError: If files are missing.
            TeamNetError: If a file is damaged.
        """
        files = self.files()
        try:
            images, targets = self.read(split)
        except RuntimeError as error:
            raise TeamNetError(
                f"One of {', '.join(map(str, files.values()))} is damaged, by its checksum. Delete "
                "them and download them again."
            ) from error
        labels = np.asarray(targets, dtype=np.int64)
        dataset = TensorDataset(
            torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)
        )
        return dataset, labels


class CIFAR10(SmallPhotos):
    """CIFAR-10: 50,000 training and 10,000 test photos, 32x32, 10 classes.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images". The pickled
    batches are expected in ``root/cifar-10-batches-py`` (torchvision's layout), and unpickled only
    if their checksums are right.

    The standard augmentation is a random crop after padding by 4 pixels and a horizontal flip (Lee
    et al. 2015, arXiv:1409.5185; He et al. 2016, arXiv:1512.03385).

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    reader: type[datasets.CIFAR10] = datasets.CIFAR10
    folders = ("cifar-10-batches-py",)
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns a random crop after padding, and a horizontal flip."""
        return [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            *super().default_train_transform(),
        ]

    def fetch(self) -> None:
        """Downloads the files with torchvision."""
        self.reader(self.root, download=True)

    def read(self, split: Split) -> tuple[npt.NDArray[np.uint8], npt.ArrayLike]:
        """Reads images (N, 3, 32, 32) and labels with torchvision."""
        dataset = self.reader(self.root, train=split == "train")
        self.classes = dataset.classes
        return dataset.data.transpose(0, 3, 1, 2), dataset.targets


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 training and 10,000 test photos, 32x32, 100 classes.

    Source, files and augmentation are those of `CIFAR10`, but the folder is
    ``root/cifar-100-python``.

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    reader = datasets.CIFAR100
    folders = ("cifar-100-python",)
    names = ("train", "test", "meta")


class SVHN(SmallPhotos):
    """SVHN, cropped digits: 73,257 training and 26,032 test photos of house numbers, 32x32.

    Source: Netzer et al. 2011, "Reading digits in natural images with unsupervised feature
    learning". ``train_32x32.mat`` and ``test_32x32.mat`` are expected in ``root``. The digit 0 is
    class 0, although it is 10 in the files.

    There is no standard augmentation (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    num_classes = 10
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    names = ("train_32x32.mat", "test_32x32.mat")

    def fetch(self) -> None:
        """Downloads the files with torchvision."""
        for split in ("train", "test"):
            datasets.SVHN(self.root, split, download=True)

    def read(self, split: Split) -> tuple[npt.NDArray[np.uint8], npt.ArrayLike]:
        """Reads images (N, 3, 32, 32) and labels with torchvision."""
        dataset = datasets.SVHN(self.root, split)
        return dataset.data, dataset.labels

"""MNIST and the datasets in its format: grey images of 28x28 pixels in idx files."""

import zlib
from collections.abc import Callable
from gzip import BadGzipFile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

from teamnet_pl.data.base import Split
from teamnet_pl.data.downloads import SmallImages
from teamnet_pl.errors import TeamNetError

_IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")


class MNIST(SmallImages):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, grey, 28x28, 10 classes.

    Source: LeCun et al. 1998, doi:10.1109/5.726791. The four idx files, plain or gzipped, are
    expected in ``root/MNIST/raw`` (torchvision's layout) or in ``root`` itself. If neither has
    them, torchvision downloads them to the former.

    The standard augmentation is a random crop after padding by 2 pixels, without flips, which would
    change digits.

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    num_classes = 10
    stored_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    folders = ("MNIST/raw", "")
    names = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in _IDX)
    endings = (".gz", "")

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns a random crop after padding."""
        return [v2.RandomCrop(28, padding=2), *super().default_train_transform()]

    def fetch(self) -> None:
        """Downloads the files with torchvision."""
        datasets.MNIST(self.root, download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Loads a split.

        Args:
            split: "train" or "test".

        Returns:
            The images, uint8 (1, 28, 28), with their labels; and the labels.

        Raises:
            FileNotFoundError: If files are missing.
            TeamNetError: If a file is damaged.
        """
        files = self.files()
        images_file, labels_file = (
            files[name] for name in (self.names[:2] if split == "train" else self.names[2:])
        )
        images = _read(images_file, read_image_file)
        labels = _read(labels_file, read_label_file)
        if len(images) != len(labels):
            raise TeamNetError(
                f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels. "
                "One of them is damaged or of another dataset: download both again."
            )
        return TensorDataset(images.unsqueeze(1), labels), labels.numpy()


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images, grey, 28x28, 10 classes of clothes.

    Source: Xiao et al. 2017, arXiv:1708.07747. The four idx files, plain or gzipped, are expected
    in ``root/FashionMNIST/raw`` (torchvision's layout) or in ``root`` itself (such as
    /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist), which are only
    read. If neither has them, torchvision downloads them to the former.

    The standard augmentation is a random crop after padding by 2 pixels and a horizontal flip.

    Args:
        **kwargs: Arguments of `SmallImages`.
    """

    mean = (0.2860,)
    std = (0.3530,)
    folders = ("FashionMNIST/raw", "")

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns a random crop after padding, and a horizontal flip."""
        return [*super().default_train_transform(), v2.RandomHorizontalFlip()]

    classes = datasets.FashionMNIST.classes

    def fetch(self) -> None:
        """Downloads the files with torchvision."""
        datasets.FashionMNIST(self.root, download=True)


class EMNIST(MNIST):
    """EMNIST: up to 814,255 images of handwritten letters and digits, grey, 28x28.

    Source: Cohen et al. 2017, arXiv:1702.05373. The idx files of a variant, plain or gzipped, are
    expected in ``root/EMNIST/raw`` (torchvision's layout) or in ``root`` itself. If neither has
    them, torchvision downloads all variants to the former.

    The files hold the images transposed; here they are upright. The labels of "letters" begin at 1
    in the files and at 0 here. The augmentation is that of `MNIST`.

    Args:
        variant: The selection of images and classes: all 62 classes ("byclass"), 47 classes with
            upper and lower case merged where they look alike ("bymerge", and "balanced" with equal
            counts), the 26 letters alone, or the 10 digits alone ("digits", and "mnist" with the
            counts of MNIST).
        **kwargs: Arguments of `SmallImages`.
    """

    # Of the training split of "balanced"; those of the other variants are close to them.
    mean = (0.1751,)
    std = (0.3332,)
    folders = ("EMNIST/raw", "")

    def __init__(
        self,
        *,
        variant: Literal[
            "byclass", "bymerge", "balanced", "letters", "digits", "mnist"
        ] = "balanced",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variant = variant
        self.first_label = 1 if variant == "letters" else 0
        self.classes = datasets.EMNIST.classes_split_dict[variant][self.first_label :]
        self.num_classes = len(self.classes)
        self.names = tuple(
            f"emnist-{variant}-{part}-{kind}" for part in ("train", "test") for kind in _IDX
        )

    def fetch(self) -> None:
        """Downloads the files with torchvision."""
        datasets.EMNIST(self.root, self.variant, download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Loads a split with upright images; see `MNIST.load_split`."""
        dataset, _ = super().load_split(split)
        images, labels = dataset.tensors  # type: ignore[attr-defined]
        labels = labels - self.first_label
        return TensorDataset(images.transpose(2, 3).contiguous(), labels), labels.numpy()


def _read(path: Path, reader: Callable[[Path], Tensor]) -> Tensor:
    """Reads an idx file; a gzipped one is unpacked elsewhere, as ``path`` may be read-only."""
    try:
        if path.suffix != ".gz":
            return reader(path)
        with TemporaryDirectory() as temporary:
            return reader(extract_archive(path, temporary))
    # torchvision's reader and gzip raise these on unexpected bytes.
    except (
        AssertionError,
        BadGzipFile,
        EOFError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
        zlib.error,
    ) as error:
        raise TeamNetError(
            f"{path} is truncated or is not the expected idx file ({error!r}). Delete it and "
            "download it again."
        ) from error

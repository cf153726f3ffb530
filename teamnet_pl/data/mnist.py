"""MNIST and the datasets in its format: grey, 28x28 pixels, in idx files."""

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

    Source: LeCun et al. 1998, doi:10.1109/5.726791. The four idx files, as they are or gzipped, are
    looked for in ``root/MNIST/raw`` (torchvision's layout) and in ``root`` itself. If neither has
    them, torchvision downloads them to the former.

    The standard augmentation is a random crop after padding by 2 pixels; no flips, which change
    digits.

    Args:
        **kwargs: Arguments of :class:`SmallImages`.
    """

    num_classes = 10
    stored_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    folders = ("MNIST/raw", "")
    names = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in _IDX)
    endings = (".gz", "")

    def default_train_transform(self) -> list[v2.Transform]:
        """Random crop after padding."""
        return [v2.RandomCrop(28, padding=2), *super().default_train_transform()]

    def fetch(self) -> None:
        """Download the files by torchvision."""
        datasets.MNIST(self.root, download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Load one split.

        Args:
            split: "train" or "test".

        Returns:
            The images, uint8 (1, 28, 28), with their labels; and the labels.

        Raises:
            FileNotFoundError: Files are missing.
            ValueError: A file is damaged.
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
                "One of them is damaged or of another dataset: get both again."
            )
        return TensorDataset(images.unsqueeze(1), labels), labels.numpy()


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images, grey, 28x28, 10 classes of clothes.

    Source: Xiao et al. 2017, arXiv:1708.07747. The four idx files, as they are or gzipped, are
    looked for in ``root/FashionMNIST/raw`` (torchvision's layout) and in ``root`` itself (such as
    /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist), which are only
    read. If neither has them, torchvision downloads them to the former.

    The standard augmentation is a random crop after padding by 2 pixels and a horizontal flip.

    Args:
        **kwargs: Arguments of :class:`SmallImages`.
    """

    mean = (0.2860,)
    std = (0.3530,)
    folders = ("FashionMNIST/raw", "")

    def default_train_transform(self) -> list[v2.Transform]:
        """Random crop after padding, and horizontal flip."""
        return [*super().default_train_transform(), v2.RandomHorizontalFlip()]

    classes = datasets.FashionMNIST.classes

    def fetch(self) -> None:
        """Download the files by torchvision."""
        datasets.FashionMNIST(self.root, download=True)


class EMNIST(MNIST):
    """EMNIST: up to 814,255 images of handwritten letters and digits, grey, 28x28.

    Source: Cohen et al. 2017, arXiv:1702.05373. The idx files of a variant, as they are or gzipped,
    are looked for in ``root/EMNIST/raw`` (torchvision's layout) and in ``root`` itself. If neither
    has them, torchvision downloads all variants to the former.

    The files hold each image on its side; here it is upright. The labels of "letters" begin at 1 in
    the file, here at 0. The augmentation is `MNIST`'s.

    Args:
        variant: Which of the ways that the images are split: by class (62), with upper and lower
            case merged where they look alike (47, "balanced" with as many of each), letters alone
            (26) or digits alone (10, "mnist" with as many as MNIST).
        **kwargs: Arguments of :class:`SmallImages`.
    """

    # Over the training split of "balanced", as the other variants' are close to it.
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
        self.first = 1 if variant == "letters" else 0
        self.classes = datasets.EMNIST.classes_split_dict[variant][self.first :]
        self.num_classes = len(self.classes)
        self.names = tuple(
            f"emnist-{variant}-{part}-{kind}" for part in ("train", "test") for kind in _IDX
        )

    def fetch(self) -> None:
        """Download the files by torchvision."""
        datasets.EMNIST(self.root, self.variant, download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Load one split, upright; see :meth:`MNIST.load_split`."""
        dataset, _ = super().load_split(split)
        images, labels = dataset.tensors  # type: ignore[attr-defined]
        labels = labels - self.first
        return TensorDataset(images.transpose(2, 3).contiguous(), labels), labels.numpy()


def _read(path: Path, reader: Callable[[Path], Tensor]) -> Tensor:
    """Read an idx file; a gzipped one through a temporary folder, as ``path`` may be read-only."""
    try:
        if path.suffix != ".gz":
            return reader(path)
        with TemporaryDirectory() as temporary:
            return reader(extract_archive(path, temporary))
    # What torchvision's reader and gzip raise on bytes they didn't expect.
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
            f"{path} is truncated or isn't the idx file it should be ({error!r}). Delete it and "
            "get it again."
        ) from error

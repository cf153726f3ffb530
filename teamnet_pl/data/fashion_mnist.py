"""Fashion-MNIST: clothes, 28x28 pixels."""

import zlib
from collections.abc import Callable
from gzip import BadGzipFile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

from teamnet_pl.data.base import ImageDataModule, Split

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images, grey, 28x28, 10 classes of clothes.

    Source: Xiao et al. 2017, arXiv:1708.07747. The four idx files, as they are or gzipped, are
    looked for in ``root/FashionMNIST/raw`` (torchvision's layout) and in ``root`` itself (such as
    /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist), which are only
    read. If neither has them, torchvision downloads them to the former.

    The standard augmentation is a random crop after padding by 2 pixels and a horizontal flip.

    Args:
        root: Folder of the dataset.
        download: Whether to download the files when they aren't found.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Raises:
        FileNotFoundError: In ``prepare_data`` or ``setup``: files are missing, and not to be
            downloaded or not downloadable.
        ValueError: An argument is out of its range; in ``setup``, a file is damaged.
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    mean = (0.2860,)
    std = (0.3530,)

    def __init__(self, *, root: str | Path = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.download = download

    def default_train_transform(self) -> list[v2.Transform]:
        """Random crop after padding, and horizontal flip."""
        return [v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()]

    def prepare_data(self) -> None:
        """Download the files if they are missing (Lightning's hook)."""
        try:
            self._files()
        except FileNotFoundError as missing:
            if not self.download:
                raise
            try:
                datasets.FashionMNIST(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(f"{missing} The download failed: {error}") from error

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
        files = self._files()
        images_file, labels_file = (
            files[name] for name in (_FILES[:2] if split == "train" else _FILES[2:])
        )
        images = _read(images_file, read_image_file)
        labels = _read(labels_file, read_label_file)
        if len(images) != len(labels):
            raise ValueError(
                f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels. "
                "One of them is damaged or of another dataset: get both again."
            )
        return TensorDataset(images.unsqueeze(1), labels), labels.numpy()

    def _files(self) -> dict[str, Path]:
        """The four files, by name without .gz."""
        looked_in = []
        for folder in (self.root / "FashionMNIST" / "raw", self.root):
            found = {
                name: path
                for name in _FILES
                for path in (folder / f"{name}.gz", folder / name)
                if path.is_file()
            }
            missing = [name for name in _FILES if name not in found]
            if not missing:
                return found
            looked_in.append(f"{folder} (missing: {', '.join(missing)})")
        raise FileNotFoundError(
            f"Fashion-MNIST isn't in {' or in '.join(looked_in)}; each file may also end in .gz. "
            "Set root to the folder that has the four files, or download=True and connect to the "
            "internet."
        )


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
        raise ValueError(
            f"{path} is truncated or isn't the idx file it should be ({error!r}). Delete it and "
            "get it again."
        ) from error

"""MedMNIST: medical images in MNIST's fashion."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets.utils import check_integrity

from teamnet_pl.data.base import Split
from teamnet_pl.data.downloads import DownloadedImages
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require


class MedMNIST(DownloadedImages):
    """One of the 2D datasets of MedMNIST with one label an image, such as PathMNIST.

    Source: Yang et al. 2023, arXiv:2110.14795. Classes and channels are the dataset's. The file
    ``<name>.npz`` (or ``<name>_64.npz``) is looked for in ``root``; if it isn't there, the package
    ``medmnist`` downloads it. Training, validation and test splits are the official ones. As
    there, mean and standard deviation are 0.5, and there is no augmentation.

    Args:
        name: Which dataset.
        size: Height and width in pixels.
        **kwargs: Arguments of :class:`DownloadedImages`.

    Raises:
        ModuleNotFoundError: The package isn't installed.
        FileNotFoundError: As :class:`DownloadedImages`.
        ValueError: There is no such dataset, or it is in 3D or has several labels an image; in
            ``setup``, the file is damaged.
    """

    has_val = True

    def __init__(
        self, *, name: str = "pathmnist", size: Literal[28, 64, 128, 224] = 28, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.package = require("medmnist", "medmnist")
        datasets = {
            name: info
            for name, info in self.package.INFO.items()
            if "multi-label" not in info["task"] and not name.endswith("3d")
        }
        if name not in datasets:
            raise TeamNetError(
                f"name must be one of {', '.join(datasets)}, got {name!r}. Those in 3D or with "
                "several labels an image are not for classifiers of images."
            )
        self.info = datasets[name]
        self.size = size
        self.suffix = "" if size == 28 else f"_{size}"
        self.names = (f"{name}{self.suffix}.npz",)
        channels = self.info["n_channels"]
        self.classes = [self.info["label"][str(label)] for label in range(len(self.info["label"]))]
        self.num_classes = len(self.classes)
        self.input_shape = (channels, size, size)
        self.mean = self.std = (0.5,) * channels

    def fetch(self) -> None:
        """Download the file by the package."""
        self._read("train", download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Load one split.

        Args:
            split: "train", "val" or "test".

        Returns:
            The images, uint8 (channels, size, size), with their labels; and the labels.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The file is damaged.
        """
        (path,) = self.files().values()
        if not check_integrity(path, self.info[f"MD5{self.suffix}"]):
            raise TeamNetError(f"{path} is damaged, by its checksum. Delete it and get it again.")
        dataset = self._read(split)
        images = torch.from_numpy(dataset.imgs)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        labels = dataset.labels.squeeze(1).astype(np.int64)
        return TensorDataset(images, torch.from_numpy(labels)), labels

    def _read(self, split: str, download: bool = False) -> Any:
        reader = getattr(self.package, self.info["python_class"])
        return reader(split, root=self.root, size=self.size, download=download)

"""MedMNIST: medical images in the style of MNIST."""

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
    """A 2D dataset of MedMNIST with one label per image, such as PathMNIST.

    Source: Yang et al. 2023, arXiv:2110.14795. Classes and channels are those of the dataset. The
    file ``<name>.npz`` (or ``<name>_64.npz``) is expected in ``root``; if it is missing, the
    package ``medmnist`` downloads it. Training, validation and test splits are the official ones.
    As in the publication, mean and standard deviation are 0.5, and there is no augmentation.

    Args:
        name: Name of the dataset.
        size: Height and width in pixels.
        **kwargs: Arguments of `DownloadedImages`.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If the file is missing; see `DownloadedImages`.
        TeamNetError: If there is no such dataset, or it is in 3D or has several labels per image,
            or, in ``setup``, the file is damaged.
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
                f"name must be one of {', '.join(datasets)}, found {name!r}. Datasets in 3D or "
                "with several labels per image are not supported."
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
        """Downloads the file with the package."""
        self._read("train", download=True)

    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        """Loads a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            The images, uint8 (channels, size, size), with their labels; and the labels.

        Raises:
            FileNotFoundError: If the file is missing.
            TeamNetError: If the file is damaged.
        """
        (path,) = self.files().values()
        if not check_integrity(path, self.info[f"MD5{self.suffix}"]):
            raise TeamNetError(
                f"{path} is damaged, by its checksum. Delete it and download it again."
            )
        dataset = self._read(split)
        images = torch.from_numpy(dataset.imgs)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        labels = dataset.labels.squeeze(1).astype(np.int64)
        return TensorDataset(images, torch.from_numpy(labels)), labels

    def _read(self, split: str, download: bool = False) -> Any:
        reader = getattr(self.package, self.info["python_class"])
        return reader(split, root=self.root, size=self.size, download=download)

"""The bases of the data modules of datasets that are downloaded once."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from teamnet_pl.data.splits import SplitDataModule
from teamnet_pl.errors import TeamNetError


class DownloadedImages(SplitDataModule):
    """Base of the datasets with a fixed set of files.

    One process of each machine downloads missing files. Checksums are verified. Existing files are
    only read.

    Args:
        root: Folder of the dataset.
        download: Whether to download missing files.
        **kwargs: Arguments of `SplitDataModule`.

    Attributes:
        folders: Folders under ``root`` that are searched; one of them has to hold all files.
        names: Names of the files, or of folders of files.
        endings: Endings that each name may have.

    Raises:
        FileNotFoundError: In ``prepare_data`` or ``setup``, if files are missing and may not or
            cannot be downloaded.
        TeamNetError: If an argument is out of its range, or, in ``setup``, a file is damaged.
    """

    folders: Sequence[str] = ("",)
    names: Sequence[str]
    endings: Sequence[str] = ("",)

    def __init__(self, *, root: str | Path = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.download = download

    @abstractmethod
    def fetch(self) -> None:
        """Downloads the files."""

    def prepare_data(self) -> None:
        """Downloads the files if they are missing (Lightning's hook)."""
        try:
            self.files()
        except FileNotFoundError as missing:
            if not self.download:
                raise
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self.fetch()
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(f"{missing} The download failed: {error}") from error

    def files(self) -> dict[str, Path]:
        """Finds the files.

        Returns:
            The path of each file by its name.

        Raises:
            FileNotFoundError: If files are missing; the message lists them and the folders
                searched.
        """
        searched = []
        for folder in (self.root / folder for folder in self.folders):
            paths = {
                name: path
                for name in self.names
                for path in (folder / f"{name}{ending}" for ending in self.endings)
                if path.exists()
            }
            missing = [name for name in self.names if name not in paths]
            if not missing:
                return paths
            searched.append(f"{folder} (missing: {', '.join(missing)})")
        also = [f"; each may also end in {ending}" for ending in self.endings if ending]
        raise FileNotFoundError(
            f"{type(self).__name__} is not in {' or in '.join(searched)}{''.join(also)}. Set root "
            "to the folder of the files, or set download=True and connect to the internet."
        )


class SmallImages(DownloadedImages):
    """Base of the datasets of small images of one size, which are held in memory.

    Args:
        image_size: Height and width in pixels that images are scaled to (bilinearly, after the
            standard augmentation), for nets that need larger images; ``None`` for the size in the
            files.
        **kwargs: Arguments of `DownloadedImages`.

    Attributes:
        stored_shape: (channels, height, width) of the images in the files.

    Raises:
        TeamNetError: If an argument is out of its range.
    """

    stored_shape: tuple[int, int, int]

    def __init__(self, *, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if image_size is not None and image_size < 1:
            raise TeamNetError(f"image_size must be at least 1, found {image_size}.")
        self.image_size = image_size
        channels, height, width = self.stored_shape
        self.input_shape = (channels, image_size or height, image_size or width)

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns the scaling alone."""
        return self.eval_transform()

    def eval_transform(self) -> list[v2.Transform]:
        """Returns the scaling, if an image size is set."""
        return [] if self.image_size is None else [v2.Resize([self.image_size] * 2)]

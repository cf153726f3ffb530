"""Datasets that are downloaded once, and looked for where they are."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teamnet_pl.data.base import ImageDataModule


class DownloadedImages(ImageDataModule):
    """Base of the datasets with a fixed set of files.

    Lightning has one process of each machine download them. Their checksums are checked. What is
    there already is only read.

    Args:
        root: Folder of the dataset.
        download: Whether to download the files when they aren't found.
        **kwargs: Arguments of :class:`ImageDataModule`.

    Attributes:
        folders: Where under ``root`` the files may be: all of them in one of these.
        names: The files, or folders full of them.
        endings: What each name may end in besides.

    Raises:
        FileNotFoundError: In ``prepare_data`` or ``setup``: files are missing, and not to be
            downloaded or not downloadable.
        ValueError: An argument is out of its range; in ``setup``, a file is damaged.
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
        """Download the files."""

    def prepare_data(self) -> None:
        """Download the files if they are missing (Lightning's hook)."""
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
        """Where the files are, by name.

        Raises:
            FileNotFoundError: Some are missing.
        """
        looked_in = []
        for folder in (self.root / folder for folder in self.folders):
            found = {
                name: path
                for name in self.names
                for path in (folder / f"{name}{ending}" for ending in self.endings)
                if path.exists()
            }
            missing = [name for name in self.names if name not in found]
            if not missing:
                return found
            looked_in.append(f"{folder} (missing: {', '.join(missing)})")
        also = [f"; each may also end in {ending}" for ending in self.endings if ending]
        raise FileNotFoundError(
            f"{type(self).__name__} isn't in {' or in '.join(looked_in)}{''.join(also)}. Set root "
            "to the folder that has them, or download=True and connect to the internet."
        )

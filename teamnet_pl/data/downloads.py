"""Datasets that are downloaded once, and looked for where they are."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from teamnet_pl.data.base import ImageDataModule
from teamnet_pl.errors import TeamNetError


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


class SmallImages(DownloadedImages):
    """Base of the datasets of small images, all of one size, which are held in memory.

    Args:
        image_size: Height and width in pixels that images are scaled to (bilinearly, after the
            standard augmentation), for nets that want more; ``None`` for that of the files.
        **kwargs: Arguments of :class:`DownloadedImages`.

    Attributes:
        stored_shape: (channels, height, width) of the images in the files.

    Raises:
        ValueError: An argument is out of its range.
    """

    stored_shape: tuple[int, int, int]

    def __init__(self, *, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if image_size is not None and image_size < 1:
            raise TeamNetError(f"image_size must be at least 1, got {image_size}.")
        self.image_size = image_size
        channels, height, width = self.stored_shape
        self.input_shape = (channels, image_size or height, image_size or width)

    def default_train_transform(self) -> list[v2.Transform]:
        """Scaling alone."""
        return self.eval_transform()

    def eval_transform(self) -> list[v2.Transform]:
        """Scaling, if there is a size to bring images to."""
        return [] if self.image_size is None else [v2.Resize([self.image_size] * 2)]

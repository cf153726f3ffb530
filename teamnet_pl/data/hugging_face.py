"""Image datasets of the Hugging Face Hub, or in files that the library ``datasets`` reads."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from teamnet_pl.data.base import Split
from teamnet_pl.data.encoded import EncodedSplitDataModule
from teamnet_pl.data.images import EncodedImages
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require


class RowImages(EncodedImages):
    """Images in the rows of a ``datasets.Dataset``.

    Args:
        name: Name of the dataset, for messages.
        rows: The dataset, with the column of encoded images alone.
        labels: Class of each image, shape (N,).
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each image must have; ``None`` if sizes may differ.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        labels: npt.ArrayLike,
        channels: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(labels, channels, size)
        self.name = name
        self.rows = rows
        (self.column,) = rows.column_names

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """Returns the name of a row, and its bytes or the file that it names."""
        image = self.rows[index][self.column] or {"bytes": b"", "path": None}
        name = f"{self.name}, row {index}" + (f" ({image['path']})" if image["path"] else "")
        content = image["bytes"]
        return name, Path(image["path"]) if content is None else BytesIO(content)


class HuggingFace(EncodedSplitDataModule):
    """Any dataset of images that Hugging Face's ``datasets`` loads.

    Classes, channels and, without an ``image_size``, the size are those of the training images. The
    library downloads the dataset once on each machine and keeps it in its cache, in
    ``~/.cache/huggingface`` or the folder that ``HF_HOME`` names; with ``HF_HUB_OFFLINE=1``, it
    uses the cache alone.

    Args:
        path: Name of a dataset on the Hub, such as ``uoft-cs/cifar10``, or a folder with files that
            the library reads, such as ``train-00000.parquet`` and ``test-00000.parquet``.
        name: Configuration of the dataset, if it has several.
        revision: Version on the Hub: a branch, tag or commit.
        download: Whether ``path`` may be a dataset on the Hub; otherwise it must be a folder.
        train: Name of the training split.
        val: Name of the validation split. If it does not exist, or with a ``val_fraction``, the
            validation set is taken from the training split.
        test: Name of the test split, only needed to test and predict.
        image_column: The column with the images; by default the only one.
        label_column: The column with the labels; by default the only one with classes, or
            ``label``. Labels are classes, integers from 0 or texts.
        image_size: See `EncodedImageDataModule`.
        **kwargs: Arguments of `EncodedSplitDataModule`.

    Raises:
        ModuleNotFoundError: If the library is not installed.
        FileNotFoundError: If there is no such dataset.
        TeamNetError: If there is no such split or column, images differ in size, or an image cannot
            be read.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        download: bool = True,
        train: str = "train",
        val: str = "validation",
        test: str = "test",
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        library = require("datasets", "huggingface")
        folder = Path(path).expanduser()
        if not download and not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder.absolute()} with a file for each split, such as "
                f"{train}-00000.parquet. Set path to the folder, or download=True for a dataset on "
                "the Hub."
            )
        self.path = str(folder)
        try:
            self.splits = library.load_dataset(self.path, name, revision=revision)
        except (OSError, library.exceptions.DatasetsError) as error:
            raise FileNotFoundError(
                f"{path} is not a folder of files that Hugging Face's datasets can read, and "
                f"cannot be loaded from the Hub: {error}"
            ) from error
        self.split_names = {"train": train, "val": val, "test": test}
        self.has_val = val in self.splits

        features = self._rows("train").features
        images = [key for key, kind in features.items() if isinstance(kind, library.Image)]
        self.image_column = _column("image_column", image_column, images, features)
        labels = [key for key, kind in features.items() if isinstance(kind, library.ClassLabel)]
        labels = labels or [key for key in features if key == "label"]
        self.label_column = _column("label_column", label_column, labels, features)
        self.splits = self.splits.cast_column(self.image_column, library.Image(decode=False))

        kind = features[self.label_column]
        values = self._labels("train")
        self.texts: list[str] | None = None
        if isinstance(kind, library.ClassLabel):
            self.classes = kind.names
            self.num_classes = kind.num_classes
        elif values.dtype.kind in "US":
            self.classes = self.texts = sorted(set(values.tolist()))
            self.num_classes = len(self.texts)
        elif values.dtype.kind in "iu" and values.ndim == 1:
            self.num_classes = int(values.max()) + 1
        else:
            raise TeamNetError(
                f"label_column {self.label_column!r} of {path} must hold a class, an integer or a "
                f"text in each row, found {kind}."
            )
        self.infer_shape(self._images("train", np.zeros(len(values)), channels=3))

    def load_split(self, split: Split) -> tuple[RowImages, npt.NDArray[np.int64]]:
        """Finds the images of a split."""
        labels = self._labels(split)
        if self.texts is not None:
            if unknown := sorted(set(labels.tolist()) - set(self.texts)):
                raise TeamNetError(
                    f"Split {self.split_names[split]!r} of {self.path} has labels that the "
                    f"training images do not have: {', '.join(unknown)}."
                )
            labels = np.searchsorted(self.texts, labels)
        images = self._images(split, labels, self.input_shape[0], self.fixed_size)
        return images, images.labels

    def _rows(self, split: Split) -> Any:
        name = self.split_names[split]
        if name not in self.splits:
            raise TeamNetError(
                f"{self.path} has no split {name!r}, only {', '.join(self.splits)}: set {split}."
            )
        return self.splits[name]

    def _labels(self, split: Split) -> npt.NDArray[Any]:
        column = self.label_column
        return np.asarray(self._rows(split).select_columns([column])[:][column])

    def _images(
        self,
        split: Split,
        labels: npt.NDArray[Any],
        channels: int,
        size: tuple[int, int] | None = None,
    ) -> RowImages:
        rows = self._rows(split).select_columns([self.image_column])
        return RowImages(f"{self.path}, {self.split_names[split]}", rows, labels, channels, size)


def _column(
    argument: str, given: str | None, candidates: list[str], features: dict[str, Any]
) -> str:
    """Chooses the column that was given, or else the only candidate."""
    if given is not None and given in features:
        return given
    if given is None and len(candidates) == 1:
        return candidates[0]
    columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    raise TeamNetError(f"Set {argument} to one of the columns {columns}, found {given}.")

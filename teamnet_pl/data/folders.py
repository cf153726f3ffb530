"""Images in folders: ImageNet, Imagenette, Tiny-ImageNet and the user's own."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import download_and_extract_archive

from teamnet_pl.data.base import Split
from teamnet_pl.data.downloads import DownloadedImages
from teamnet_pl.data.encoded import EncodedSplitDataModule
from teamnet_pl.data.images import ImageFiles
from teamnet_pl.errors import TeamNetError


def classes_in(folder: Path) -> list[str]:
    """Lists the classes in a folder: the sorted names of its folders.

    Raises:
        FileNotFoundError: If the folder is missing or has no folder in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}, which should hold a folder of images for each class."
        )
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and _is_users(entry)
    )
    if not classes:
        raise FileNotFoundError(
            f"{folder} should hold a folder of images for each class, but there is none in it."
        )
    return classes


def _is_users(path: Path) -> bool:
    """Tells the user's files and folders from those that a system or an editor left there."""
    return not path.name.startswith(".") and path.name != "__MACOSX"


def files_by_class(
    folder: Path, classes: Sequence[str], all_classes: bool = True
) -> tuple[list[str], list[int]]:
    """Lists the image files in a folder and their labels.

    Args:
        folder: A folder with a folder for each class.
        classes: Names of the classes in the order of the labels.
        all_classes: Whether each class must have an image.

    Returns:
        The files, sorted by class and name, and their labels.

    Raises:
        FileNotFoundError: If the folder is missing, or a class has no image.
        TeamNetError: If there is a folder of another name.
    """
    if unknown := sorted(set(classes_in(folder)) - set(classes)):
        raise TeamNetError(
            f"{folder} has folders for classes that the training images do not have: "
            f"{', '.join(unknown)}."
        )
    labels = {name: label for label, name in enumerate(classes)}

    def is_image(name: str) -> bool:
        path = Path(name)
        inside = (path, *path.parents[: len(path.relative_to(folder).parts) - 1])
        return path.suffix.lower() in IMG_EXTENSIONS and all(map(_is_users, inside))

    try:
        samples = make_dataset(folder, labels, is_valid_file=is_image, allow_empty=not all_classes)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error
    return [path for path, _ in samples], [label for _, label in samples]


def image_files(sources: Sequence[str | Path]) -> list[Path]:
    """Lists image files.

    Args:
        sources: Files, folders and patterns. Of a folder or a pattern, files with the ending of an
            image count; those in the folders of a folder too, but not hidden ones.

    Returns:
        The files of each source in order, each file once.

    Raises:
        FileNotFoundError: If a source is none of these, or holds no image.
    """
    files: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            files[path] = None
            continue
        if path.is_dir():
            listed = _files_below(path)
        else:
            listed = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        images = [file for file in listed if _is_image(file)]
        if not images:
            kind = "no image in the folder" if path.is_dir() else "no image file, folder or pattern"
            raise FileNotFoundError(f"There is {kind} {source}.")
        files |= dict.fromkeys(images)
    return list(files)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and _is_users(path) and path.is_file()


def _files_below(folder: Path) -> list[Path]:
    """Lists the files in a folder and in the folders in it, also where links lead."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if _is_users(Path(name)))
        files += [Path(parent, name) for name in sorted(names)]
    return files


def check_count(folder: Path, images: list[str], expected: int) -> None:
    """Refuses an incomplete folder, such as after interrupted unpacking.

    Args:
        folder: The folder, for the message.
        images: The images found in it.
        expected: The expected number of images.

    Raises:
        TeamNetError: If there are more or fewer images.
    """
    if len(images) != expected:
        raise TeamNetError(
            f"{folder} has {len(images)} images, not {expected}: delete it and download it again. "
            "ImageFolder can use a part of a dataset."
        )


_VAL_NAMES = ("val", "valid", "validation", "dev")


class ImageFolder(EncodedSplitDataModule):
    """The user's own images: a folder for each split with a folder for each class.

    Classes, channels and, without an ``image_size``, the size are those of the training images.
    Validation and test may lack a class. Hidden files and folders, and ``__MACOSX``, are ignored.

    Args:
        root: Folder of the splits.
        train: Name of the folder with the training images.
        val: Name of the folder with the validation images; ``None`` for an existing folder ``val``,
            ``valid``, ``validation`` or ``dev``. Without such a folder, or with a ``val_fraction``,
            they are taken from the training images.
        test: Name of the folder with the test images, only needed to test and predict.
        image_size: See `EncodedImageDataModule`.
        **kwargs: Arguments of `EncodedSplitDataModule`.

    Raises:
        FileNotFoundError: If a folder is missing, or a class has no image.
        TeamNetError: If images differ in size, an image cannot be read, or several folders may be
            meant for validation.
    """

    classes: Sequence[str]

    def __init__(
        self,
        *,
        root: str | Path,
        train: str = "train",
        val: str | None = None,
        test: str = "test",
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        root = Path(root).expanduser()
        names = [name for name in _VAL_NAMES if (root / name).is_dir()] if val is None else [val]
        if len(names) > 1:
            raise TeamNetError(
                f"{root} has the folders {' and '.join(names)}: set val to the one with the "
                "validation images."
            )
        val = names[0] if names else _VAL_NAMES[0]
        self.split_folders = {"train": root / train, "val": root / val, "test": root / test}
        self.has_val = self.split_folders["val"].is_dir()
        self.classes = classes_in(self.split_folders["train"])
        self.num_classes = len(self.classes)
        self.infer_shape(ImageFiles(*self._files("train"), channels=3))

    def val_source(self) -> str:
        """Returns where the validation images come from, for the log."""
        if self.has_val and self.val_fraction is None:
            return f"the folder {self.split_folders['val']}"
        return super().val_source()

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Finds the images of a split."""
        paths, labels = self._files(split)
        return ImageFiles(paths, labels, self.input_shape[0], self.fixed_size), labels

    def _files(self, split: Split) -> tuple[list[str], list[int]]:
        return files_by_class(self.split_folders[split], self.classes, split == "train")


class ImageNet(EncodedSplitDataModule):
    """ImageNet-1k: 1,281,167 training and 50,000 test photos, 1000 classes.

    Source: Russakovsky et al. 2015, arXiv:1409.0575. Labels are the positions of the sorted WordNet
    IDs, as is usual. The official validation images serve as the test split, since the official
    test labels are secret; the validation set is taken from the training images.

    ``root`` has torchvision's layout: folders ``train`` and ``val`` with a folder for each WordNet
    ID; or the archives that are unpacked once: ``ILSVRC2012_img_train.tar``,
    ``ILSVRC2012_img_val.tar`` and ``ILSVRC2012_devkit_t12.tar.gz`` of https://image-net.org, which
    grants access on request.

    Args:
        root: Folder of the dataset.
        image_size: Height and width in pixels.
        **kwargs: Arguments of `EncodedSplitDataModule`.

    Raises:
        FileNotFoundError: In ``prepare_data``, if both the folders and the archives are missing.
        TeamNetError: If an argument is out of its range, or, in ``setup`` or later, an image cannot
            be read or the number of images or classes is wrong.
    """

    num_classes = 1000
    images: Mapping[str, int] = {"train": 1_281_167, "test": 50_000}

    def __init__(
        self, *, root: str | Path = "data/imagenet", image_size: int = 224, **kwargs: Any
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.input_shape = (3, image_size, image_size)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Unpacks the archives if folders are missing (Lightning's hook)."""
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                try:
                    datasets.ImageNet(self.root, split)
                except (OSError, RuntimeError) as error:
                    raise FileNotFoundError(
                        f"ImageNet's {split} images are not in {self.root / split}, and cannot be "
                        f"unpacked from the archives in {self.root}: {error}"
                    ) from error

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Finds the images of a split, "train" or "test"."""
        folder = self.root / ("train" if split == "train" else "val")
        classes = classes_in(folder)
        if len(classes) != self.num_classes:
            raise TeamNetError(f"{folder} has {len(classes)} folders, not {self.num_classes}.")
        self.classes = classes
        paths, labels = files_by_class(folder, classes)
        check_count(folder, paths, self.images[split])
        return ImageFiles(paths, labels, channels=3), labels


class Imagenette(DownloadedImages, EncodedSplitDataModule):
    """Imagenette: 9,469 training and 3,925 test photos of 10 easy classes of ImageNet.

    Source: https://github.com/fastai/imagenette. Folders ``train`` and ``val`` are expected in
    ``root/imagenette2-160``, or that of another version; if they are missing, torchvision downloads
    them. The official validation images serve as the test split; the validation set is taken from
    the training images.

    The standard recipe is that of fastai: crops of 35 to 100 % of the area, and a horizontal flip.

    Args:
        version: Length of the shorter side in the files; "full" for the original size.
        image_size: Height and width in pixels.
        **kwargs: Arguments of `DownloadedImages` and `EncodedSplitDataModule`.

    Raises:
        FileNotFoundError: If files are missing; see `DownloadedImages`.
        TeamNetError: If an argument is out of its range, an image cannot be read, or the number of
            images is wrong.
    """

    num_classes = 10
    images: Mapping[str, int] = {"train": 9469, "test": 3925}
    min_area = 0.35

    def __init__(
        self,
        *,
        version: Literal["full", "320px", "160px"] = "160px",
        image_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.input_shape = (3, image_size, image_size)
        self.version = version
        folder = "imagenette2" + ("" if version == "full" else "-" + version.removesuffix("px"))
        self.names = (f"{folder}/train", f"{folder}/val")

    def fetch(self) -> None:
        """Downloads and unpacks the images with torchvision."""
        datasets.Imagenette(self.root, size=self.version, download=True)

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Finds the images of a split, "train" or "test"."""
        folder = self.files()[self.names[0 if split == "train" else 1]]
        self.classes = classes_in(folder)
        paths, labels = files_by_class(folder, self.classes)
        check_count(folder, paths, self.images[split])
        return ImageFiles(paths, labels, channels=3), labels


class TinyImageNet(DownloadedImages, EncodedSplitDataModule):
    """Tiny-ImageNet: 100,000 training and 10,000 test photos, 64x64, 200 classes of ImageNet.

    Source: Stanford's course CS231n, http://cs231n.stanford.edu. The images are expected in
    ``root/tiny-imagenet-200`` and downloaded if they are missing. The official validation images
    serve as the test split, since the official test labels are secret; the validation set is taken
    from the training images.

    The standard recipe at the original size is that of CIFAR: a random crop after padding by 8
    pixels, and a horizontal flip; at other sizes, that of ImageNet.

    Args:
        image_size: Height and width in pixels that images are brought to; ``None`` for the size in
            the files.
        **kwargs: Arguments of `DownloadedImages` and `EncodedSplitDataModule`.

    Raises:
        FileNotFoundError: If files are missing; see `DownloadedImages`.
        TeamNetError: If an argument is out of its range, an image cannot be read, the number of
            images is wrong, or there are annotations of other classes.
    """

    num_classes = 200
    images: Mapping[str, int] = {"train": 100_000, "test": 10_000}
    input_shape = (3, 64, 64)
    folders = ("tiny-imagenet-200", "")
    names = ("train", "val/images", "val/val_annotations.txt")
    archive = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def __init__(self, *, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, **kwargs)
        if image_size is not None:
            self.input_shape = (3, image_size, image_size)

    def fetch(self) -> None:
        """Downloads and unpacks the images."""
        download_and_extract_archive(self.archive, self.root, md5=self.md5)

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Finds the images of a split, "train" or "test"."""
        train, folder, annotations = self.files().values()
        self.classes = classes = classes_in(train)
        if split == "train":
            paths, labels = files_by_class(train, classes)
            check_count(train, paths, self.images["train"])
            return ImageFiles(paths, labels, 3, self.fixed_size), labels
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
        if unknown := {line[1] for line in lines} - set(classes):
            raise TeamNetError(
                f"{annotations} names classes that {train} does not have: "
                f"{', '.join(sorted(unknown))}."
            )
        labels = [classes.index(line[1]) for line in lines]
        paths = [str(folder / line[0]) for line in lines]
        check_count(folder, paths, self.images["test"])
        return ImageFiles(paths, labels, 3, self.fixed_size), labels

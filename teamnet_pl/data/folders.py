"""Images in folders: ImageNet, Imagenette, Tiny-ImageNet and your own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import download_and_extract_archive

from teamnet_pl.data.base import Split
from teamnet_pl.data.downloads import DownloadedImages
from teamnet_pl.data.images import EncodedImageDataModule, ImageFiles
from teamnet_pl.errors import TeamNetError


def classes_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted: a class each.

    Raises:
        FileNotFoundError: There is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}, which should hold a folder of images for each class."
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _counts(entry))
    if not classes:
        raise FileNotFoundError(
            f"{folder} should hold a folder of images for each class, but there is none in it."
        )
    return classes


def _counts(path: Path) -> bool:
    """Whether a file or folder is the user's, not one that a system or an editor left there."""
    return not path.name.startswith(".") and path.name != "__MACOSX"


def files_by_class(
    folder: Path, classes: Sequence[str], all_classes: bool = True
) -> tuple[list[str], list[int]]:
    """Image files and their labels.

    Args:
        folder: Holds a folder for each class.
        classes: Their names; a class's place is its label.
        all_classes: Whether each class must have an image.

    Returns:
        The files, sorted by class and name, and their labels.

    Raises:
        FileNotFoundError: There is no such folder, or a class without image.
        ValueError: There is a folder of another name.
    """
    if unknown := sorted(set(classes_in(folder)) - set(classes)):
        raise TeamNetError(
            f"{folder} has folders for other classes than the training images have: "
            f"{', '.join(unknown)}."
        )
    labels = {name: label for label, name in enumerate(classes)}

    def is_image(name: str) -> bool:
        path = Path(name)
        inside = (path, *path.parents[: len(path.relative_to(folder).parts) - 1])
        return path.suffix.lower() in IMG_EXTENSIONS and all(map(_counts, inside))

    try:
        samples = make_dataset(folder, labels, is_valid_file=is_image, allow_empty=not all_classes)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error
    return [path for path, _ in samples], [label for _, label in samples]


def check_count(folder: Path, images: list[str], expected: int) -> None:
    """Refuses a folder of which a part is missing, as after unpacking was interrupted.

    Args:
        folder: Where the images are, for the message.
        images: Those found.
        expected: How many there should be.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(images) != expected:
        raise TeamNetError(
            f"{folder} has {len(images)} images, not {expected}: delete it and get it again. A "
            "part of a dataset can be used by ImageFolder."
        )


_VAL_NAMES = ("val", "valid", "validation", "dev")


class ImageFolder(EncodedImageDataModule):
    """Your own images: a folder for each split, in it a folder for each class.

    Classes, channels and, without an ``image_size``, the resolution are those of the training
    images. A split may lack a class, other than training. Hidden files and folders, and
    ``__MACOSX``, do not count.

    Args:
        root: Holds the splits.
        train: Name of the folder with the training images.
        val: Name of the folder with the validation images; ``None`` for ``val``, ``valid``,
            ``validation`` or ``dev``, whichever is there. Where there is none, or with a
            ``val_fraction``, they are cut from the training images.
        test: Name of the folder with the test images, only needed to test and predict.
        image_size: See :class:`EncodedImageDataModule`.
        **kwargs: Arguments of :class:`EncodedImageDataModule`.

    Raises:
        FileNotFoundError: A folder is missing, or a class without image.
        ValueError: Images differ in size, one can't be read, or there are several folders that
            may be meant for validation.
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
        self.shape_from(ImageFiles(*self._files("train"), channels=3))

    def val_source(self) -> str:
        """Where the validation images come from, in words."""
        if self.has_val and self.val_fraction is None:
            return f"the folder {self.split_folders['val']}"
        return super().val_source()

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Find the images of one split."""
        paths, labels = self._files(split)
        return ImageFiles(paths, labels, self.input_shape[0], self.fixed_size), labels

    def _files(self, split: Split) -> tuple[list[str], list[int]]:
        return files_by_class(self.split_folders[split], self.classes, split == "train")


class ImageNet(EncodedImageDataModule):
    """ImageNet-1k: 1,281,167 training and 50,000 test photos, 1000 classes.

    Source: Russakovsky et al. 2015, arXiv:1409.0575. Labels are the places of the sorted WordNet
    IDs, as everywhere. The official validation images serve as test split, as the official test
    labels are secret; validation is cut from the training images.

    ``root`` holds torchvision's layout: folders ``train`` and ``val``, in each a folder for each
    WordNet ID; or the archives that they are unpacked from, once:
    ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and ``ILSVRC2012_devkit_t12.tar.gz`` of
    https://image-net.org, where they have to be asked for.

    Args:
        root: Folder of the dataset.
        image_size: Height and width in pixels.
        **kwargs: Arguments of :class:`EncodedImageDataModule`.

    Raises:
        FileNotFoundError: In ``prepare_data``: neither the folders nor the archives are there.
        ValueError: An argument is out of its range; in ``setup`` or later, an image can't be read
            or there aren't as many images and classes as there should be.
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
        """Unpack the archives if there are no folders (Lightning's hook)."""
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                try:
                    datasets.ImageNet(self.root, split)
                except (OSError, RuntimeError) as error:
                    raise FileNotFoundError(
                        f"ImageNet's {split} images are neither unpacked in {self.root / split} "
                        f"nor to be unpacked from the archives in {self.root}: {error}"
                    ) from error

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Find the images of one split, "train" or "test"."""
        folder = self.root / ("train" if split == "train" else "val")
        classes = classes_in(folder)
        if len(classes) != self.num_classes:
            raise TeamNetError(f"{folder} has {len(classes)} folders, not {self.num_classes}.")
        self.classes = classes
        paths, labels = files_by_class(folder, classes)
        check_count(folder, paths, self.images[split])
        return ImageFiles(paths, labels, channels=3), labels


class Imagenette(DownloadedImages, EncodedImageDataModule):
    """Imagenette: 9,469 training and 3,925 test photos of 10 easy classes of ImageNet.

    Source: https://github.com/fastai/imagenette. Folders ``train`` and ``val`` are looked for in
    ``root/imagenette2-160`` and the like; if there are none, torchvision downloads them. The
    official validation images serve as test split; validation is cut from the training images.

    The standard recipe is fastai's: crops of 35 to 100 % of the area, and a horizontal flip.

    Args:
        version: Length of the shorter side that the files were scaled to, or all of it.
        image_size: Height and width in pixels.
        **kwargs: Arguments of :class:`DownloadedImages` and :class:`EncodedImageDataModule`.

    Raises:
        FileNotFoundError: As :class:`DownloadedImages`.
        ValueError: As :class:`EncodedImageDataModule`; there are more or fewer images.
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
        """Download and unpack the images by torchvision."""
        datasets.Imagenette(self.root, size=self.version, download=True)

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Find the images of one split, "train" or "test"."""
        folder = self.files()[self.names[0 if split == "train" else 1]]
        self.classes = classes_in(folder)
        paths, labels = files_by_class(folder, self.classes)
        check_count(folder, paths, self.images[split])
        return ImageFiles(paths, labels, channels=3), labels


class TinyImageNet(DownloadedImages, EncodedImageDataModule):
    """Tiny-ImageNet: 100,000 training and 10,000 test photos, 64x64, 200 classes of ImageNet.

    Source: Stanford's course CS231n, http://cs231n.stanford.edu. Looked for in
    ``root/tiny-imagenet-200``; if it isn't there, it is downloaded. The official validation images
    serve as test split, as the official test labels are secret; validation is cut from the training
    images.

    The standard recipe is CIFAR's at this size: a random crop after padding by 8 pixels, and a
    horizontal flip; at another, ImageNet's.

    Args:
        image_size: Height and width in pixels to bring images to; ``None`` for that of the files.
        **kwargs: Arguments of :class:`DownloadedImages` and :class:`EncodedImageDataModule`.

    Raises:
        FileNotFoundError: As :class:`DownloadedImages`.
        ValueError: As :class:`EncodedImageDataModule`; there are more or fewer images, or
            annotations of other classes.
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
        """Download and unpack the images."""
        download_and_extract_archive(self.archive, self.root, md5=self.md5)

    def load_split(self, split: Split) -> tuple[ImageFiles, list[int]]:
        """Find the images of one split, "train" or "test"."""
        train, folder, annotations = self.files().values()
        self.classes = classes = classes_in(train)
        if split == "train":
            paths, labels = files_by_class(train, classes)
            check_count(train, paths, self.images["train"])
            return ImageFiles(paths, labels, 3, self.fixed_size), labels
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
        if unknown := {line[1] for line in lines} - set(classes):
            raise TeamNetError(
                f"{annotations} names classes that {train} doesn't have: "
                f"{', '.join(sorted(unknown))}."
            )
        labels = [classes.index(line[1]) for line in lines]
        paths = [str(folder / line[0]) for line in lines]
        check_count(folder, paths, self.images["test"])
        return ImageFiles(paths, labels, 3, self.fixed_size), labels

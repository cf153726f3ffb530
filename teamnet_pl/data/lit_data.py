"""Images in chunks written by litdata, on a disk or in an object store."""

import json
import operator
import os
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from teamnet_pl.data.base import Split
from teamnet_pl.data.encoded import EncodedImageDataModule
from teamnet_pl.data.images import (
    SAMPLED_FOR_BITS,
    check_size,
    convert_image,
    largest_value,
    read_image,
)
from teamnet_pl.data.loading import EpochSampler, LoadingError, TransformedSubset
from teamnet_pl.data.map_style import MapStyleDataModule
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

_BLOCK = 256  # images that are shuffled together: litdata reads this many rows at once
_STORES = ("s3://", "gs://", "azure://")


class ChunkedImages(Dataset[tuple[Image.Image, int]]):
    """Images in chunks, each decoded as it is read.

    Args:
        address: Folder or address of the chunks and their index.
        num_classes: Number of classes.
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each image must have; ``None`` if sizes may differ.
        image_key: Key of the image in a sample that is a dict.
        label_key: Key of the label.
        cache_dir: Folder for the chunks of an object store; ``None`` for litdata's default.

    Attributes:
        bits: Number of bits that hold values in images with 16 bits.
        chunk_sizes: Number of images in each chunk.
    """

    bits = 16

    def __init__(
        self,
        address: str,
        num_classes: int,
        channels: int,
        size: tuple[int, int] | None = None,
        image_key: str = "image",
        label_key: str = "label",
        cache_dir: str | None = None,
    ) -> None:
        self.address = address
        self.num_classes = num_classes
        self.channels = channels
        self.size = size
        self.image_key = image_key
        self.label_key = label_key
        self.cache_dir = cache_dir
        self._opened: tuple[int, Any] | None = None
        self.chunk_sizes = [stop - start for start, stop in self._reader().region_of_interest]
        self._ends = np.cumsum(self.chunk_sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image and its label.

        Raises:
            UnreadableImageError: If the image cannot be read or has a wrong size.
            LoadingError: If the sample cannot be read or does not hold an image and a label.
        """
        name, image, label = self._read(index)
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < self.num_classes:
            raise LoadingError(
                f"{name} must have a label in 0..{self.num_classes - 1}, found {label!r} "
                f"({type(label).__name__})."
            )
        return self._image(name, image), number

    def largest_value(self) -> int | None:
        """Finds the largest value in the first images; ``None`` if none of them has 16 bits."""
        first = range(min(SAMPLED_FOR_BITS, self.chunk_sizes[0]))
        images = [image for _, image, _ in map(self._read, first)]
        return largest_value(
            BytesIO(image) for image in images if isinstance(image, (bytes, memoryview))
        )

    def _reader(self) -> Any:
        """Returns this process's reader: its files and threads do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            library = require("litdata", "litdata")
            serializers = require("litdata.streaming.serializers", "litdata")
            loader = require("litdata.streaming.item_loader", "litdata").PyTreeLoader()
            try:
                reader = library.StreamingDataset(
                    _location(self.address),
                    cache_dir=self.cache_dir,
                    item_loader=loader,
                    # Encoded images are decoded here, like those of all other datasets.
                    serializers=dict.fromkeys(("jpeg", "image"), serializers.BytesSerializer()),
                )
            except (FileNotFoundError, ModuleNotFoundError):
                raise
            except Exception as error:  # the client of the store can raise errors of any class
                raise LoadingError(f"litdata cannot read {self.address}: {error}") from error
            # Otherwise, each sample would read its whole chunk.
            loader.set_mmap_allowed_chunks(set(range(len(reader.region_of_interest))))
            # Makes litdata download whole chunks: some stores do not serve parts of files.
            reader[:0]
            self._opened = os.getpid(), reader
        return self._opened[1]

    def _read(self, index: int) -> tuple[str, Any, Any]:
        """Returns the name of a sample, for messages, its image and its label."""
        name = f"{self.address}, sample {index}"
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        chunked_index = require("litdata.streaming.sampler", "litdata").ChunkedIndex(index, chunk)
        try:
            sample = self._reader()[chunked_index]
        except Exception as error:
            raise LoadingError(f"litdata cannot read {name}: {error}") from error
        if isinstance(sample, dict) and sample.keys() >= {self.image_key, self.label_key}:
            return name, sample[self.image_key], sample[self.label_key]
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            return name, sample[0], sample[1]
        keys = f" of {', '.join(map(repr, sample))}" if isinstance(sample, dict) else ""
        raise LoadingError(
            f"{name} must be a pair (image, label) or a dict with {self.image_key!r} and "
            f"{self.label_key!r}, found a {type(sample).__name__}{keys}. Set image_key and "
            "label_key, or write such samples."
        )

    def _image(self, name: str, value: Any) -> Image.Image:
        if isinstance(value, (bytes, memoryview)):
            image = read_image(name, BytesIO(value), self.channels, self.bits)
        else:
            image = convert_image(self._from_pixels(name, value), self.channels)
        check_size(name, (image.height, image.width), self.size)
        return image

    def _from_pixels(self, name: str, value: Any) -> Image.Image:
        if isinstance(value, Image.Image) and value.mode in ("L", "LA", "RGB", "RGBA", "1"):
            return value
        pixels = value
        if isinstance(value, Tensor) and value.ndim == 3:
            pixels = value.permute(1, 2, 0).numpy()
        if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8:
            if pixels.ndim == 3 and pixels.shape[2] == 1:
                pixels = pixels[:, :, 0]
            if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)):
                return Image.fromarray(pixels)
        kind = type(value).__name__
        if isinstance(value, Image.Image):
            kind += f" of mode {value.mode}"
        elif isinstance(value, (np.ndarray, Tensor)):
            kind += f" of {value.dtype} and shape {tuple(value.shape)}"
        raise LoadingError(
            f"{name} must have an image: an encoded file (bytes), a Pillow image of mode L or RGB, "
            f"a uint8 array (H, W) or (H, W, C) or a uint8 tensor (C, H, W), found {kind}."
        )


class ChunkSampler(EpochSampler):
    """Samples chunks in random order, the blocks in each chunk, and the images in each block.

    Each chunk is read once in an epoch, by all processes at about the same time.

    Args:
        dataset: The images to sample from.
        chunk_sizes: Number of images in each chunk.
        *args: Arguments of `EpochSampler`.
    """

    def __init__(self, dataset: TransformedSubset, chunk_sizes: list[int], *args: int) -> None:
        super().__init__(dataset, *args)
        chunks = np.split(np.arange(len(dataset)), np.cumsum(chunk_sizes)[:-1])
        self.chunks = [np.split(chunk, range(_BLOCK, len(chunk), _BLOCK)) for chunk in chunks]

    def order(self) -> list[int]:
        """Returns the images of this process in an epoch, the same number for each process."""
        random = np.random.default_rng([self.seed, self.epoch, 1])
        blocks = [
            random.permutation(chunk[block])
            for chunk in map(self.chunks.__getitem__, random.permutation(len(self.chunks)))
            for block in random.permutation(len(chunk))
        ]
        # Repeats the first images if the shares of the processes would differ.
        order = np.resize(np.concatenate(blocks), self.total_size)
        shared: list[int] = order[self.rank :: self.num_replicas].tolist()
        return shared


class LitData(EncodedImageDataModule, MapStyleDataModule):
    """Images in litdata's chunks, as written by ``litdata.optimize``.

    A sample is a pair (image, label) or a dict with the two. An image is an encoded file (bytes, or
    litdata's ``jpeg`` and ``image``), a Pillow image of mode L or RGB, a uint8 array of shape
    (H, W) or (H, W, C), or a uint8 tensor of shape (C, H, W). A label is an integer.

    Each split is a folder, read in place, or an address that litdata opens: ``s3://...``,
    ``gs://...`` or ``azure://...``. Chunks at an address are downloaded whole when their first
    image is needed, and kept on the disk as space permits.

    In an epoch, the chunks come in random order, as do the blocks of 256 images in each chunk and
    the images in each block, much as in litdata: let ``optimize`` write the images in random order,
    not class by class. Each process reads each chunk. Labels come with the images: an invalid label
    is an error when it is read, and no validation set can be taken from the training images.

    Args:
        num_classes: Number of classes.
        classes: Names of the classes in the order of the labels; None if classes only have numbers.
        train: Folder or address of the training images.
        val: Folder or address of the validation images.
        test: Folder or address of the test images, only needed to test and predict.
        channels: 3 for RGB, 1 for grey.
        image_size: See `EncodedImageDataModule`. ``None`` for the size of the first training image.
        image_key: Key of the image in samples that are dicts.
        label_key: Key of the label in samples that are dicts.
        cache_dir: Folder for downloaded chunks; ``None`` for ``~/.lightning/chunks``, or the folder
            that ``LITDATA_CACHE_DIR`` names.
        **kwargs: Arguments of `EncodedImageDataModule`.

    Raises:
        ModuleNotFoundError: If litdata is not installed.
        FileNotFoundError: If a folder has no index.
        TeamNetError: If an argument is out of its range, or, in ``setup`` or later, a sample, image
            or label cannot be read.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        train: str,
        val: str,
        test: str | None = None,
        classes: list[str] | None = None,
        channels: Literal[1, 3] = 3,
        image_size: int | None = None,
        image_key: str = "image",
        label_key: str = "label",
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        require("litdata", "litdata")
        self.set_classes(num_classes, classes)
        self.folders = {"train": train, "val": val, "test": test}
        self.keys = {"image_key": image_key, "label_key": label_key}
        self.cache_dir = cache_dir
        height = width = image_size
        if height is None or width is None:
            image, _ = self._images("train", channels)[0]
            height, width = image.height, image.width
        self.input_shape = (channels, height, width)
        self.set_known_statistics()

    def dataset(self, split: Split) -> ChunkedImages:
        """Opens a split.

        Args:
            split: "train", "val" or "test".
        """
        images = self._images(split, self.input_shape[0], self.fixed_size)
        if self.given_bits is None and split == "train":
            # Not by a survey, for which many chunks would be downloaded.
            self.detect_bits(images.largest_value())
        images.bits = self.bits
        return images

    def setup(self, stage: str) -> None:
        """Opens the splits that the stage needs, and measures statistics (Lightning's hook)."""
        super().setup(stage)
        if self.statistics == "data":
            self.measure_statistics(self.training_dataset(stage))

    def _train_sampler(self) -> EpochSampler:
        images = self.train_set.dataset
        assert isinstance(images, ChunkedImages)
        return ChunkSampler(self.train_set, images.chunk_sizes, self._seed, *self._processes())

    def _images(
        self, split: Split, channels: int, size: tuple[int, int] | None = None
    ) -> ChunkedImages:
        if (address := self.folders[split]) is None:
            raise TeamNetError(f"There are no {split} images: set {split}.")
        return ChunkedImages(
            address, self.num_classes, channels, size, **self.keys, cache_dir=self.cache_dir
        )


def _location(address: str) -> str:
    """Returns the address for litdata at which it leaves the folder unchanged.

    Raises:
        FileNotFoundError: If the folder has no index.
        TeamNetError: If the address is of another kind.
    """
    if "://" in address:
        if not address.startswith(_STORES):
            raise TeamNetError(
                f"it must be a folder, or an address that starts with {', '.join(_STORES)}."
            )
        return address
    folder = Path(address).expanduser().resolve()
    index = folder / "index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"There is no {index}: {address} must be a folder written by litdata.optimize."
        )
    config = json.loads(index.read_text()).get("config", {})
    whole = config.get("compression") and config.get("compression_level") in (None, "chunk")
    # litdata would overwrite compressed chunks in place, but copies those of a store.
    return f"local:{folder}" if whole else str(folder)

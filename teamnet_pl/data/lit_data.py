"""Images in the chunks that litdata writes, on a disk or in an object store."""

import json
import operator
import os
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from teamnet_pl.data.base import Split
from teamnet_pl.data.images import (
    EncodedImageDataModule,
    Statistics,
    check_size,
    largest_value,
    read_image,
    upright,
)
from teamnet_pl.data.loading import EpochSampler, TransformedSubset
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

_BLOCK = 256  # images that are shuffled together, as litdata reads so many rows at once
_STORES = ("s3://", "gs://", "azure://")


class ChunkedImages(Dataset[tuple[Image.Image, int]]):
    """Images in chunks, each decoded as it is read.

    Args:
        address: Folder or address of the chunks and their index.
        num_classes: Number of classes.
        channels: 3 for RGB, 1 for grey.
        size: Height and width that each must have; ``None`` if they may differ.
        image_key: Where the image is in a sample that is a dict.
        label_key: Where the label is.
        cache_dir: Where to keep the chunks of an object store; ``None`` for litdata's own place.

    Attributes:
        bits: How many bits of images with 16 hold values.
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
        """The image and its label; raises `UnreadableImageError`."""
        name = f"{self.address}, sample {index}"
        image, label = self._pair(name, self._sample(name, index))
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < self.num_classes:
            raise TeamNetError(
                f"{name} must have a label in 0..{self.num_classes - 1}, found {label!r} "
                f"({type(label).__name__})."
            )
        return self._image(name, image), number

    def largest_value(self) -> int | None:
        """The largest value of the first images with 16 bits; ``None`` without such images."""
        values = []
        for index in range(min(16, self.chunk_sizes[0])):
            name = f"{self.address}, sample {index}"
            value, _ = self._pair(name, self._sample(name, index))
            if isinstance(value, (bytes, memoryview)):
                values.append(largest_value(BytesIO(value)))
        return max((value for value in values if value is not None), default=None)

    def _reader(self) -> Any:
        """One for each process: its files and threads don't survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            library = require("litdata", "litdata")
            serializers = require("litdata.streaming.serializers", "litdata")
            loader = require("litdata.streaming.item_loader", "litdata").PyTreeLoader()
            try:
                reader = library.StreamingDataset(
                    _location(self.address),
                    cache_dir=self.cache_dir,
                    item_loader=loader,
                    # Encoded images are decoded as all others are.
                    serializers=dict.fromkeys(("jpeg", "image"), serializers.BytesSerializer()),
                )
            except (FileNotFoundError, ModuleNotFoundError):
                raise
            except Exception as error:  # whatever the store's client raises
                raise TeamNetError(f"{self.address} can't be read by litdata: {error}") from error
            # Else each sample would read its whole chunk.
            loader.set_mmap_allowed_chunks(set(range(len(reader.region_of_interest))))
            # To get whole chunks: parts of some can't be had.
            reader[:0]
            self._opened = os.getpid(), reader
        return self._opened[1]

    def _sample(self, name: str, index: int) -> Any:
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        place = require("litdata.streaming.sampler", "litdata").ChunkedIndex(index, chunk)
        try:
            return self._reader()[place]
        except Exception as error:
            raise TeamNetError(f"{name} can't be read by litdata: {error}") from error

    def _pair(self, name: str, sample: Any) -> tuple[Any, Any]:
        """Image and label of a sample."""
        if isinstance(sample, dict) and sample.keys() >= {self.image_key, self.label_key}:
            return sample[self.image_key], sample[self.label_key]
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            return sample[0], sample[1]
        keys = f" of {', '.join(map(repr, sample))}" if isinstance(sample, dict) else ""
        raise TeamNetError(
            f"{name} must be a pair (image, label) or a dict with {self.image_key!r} and "
            f"{self.label_key!r}, found a {type(sample).__name__}{keys}. Set image_key and "
            "label_key, or write the samples so."
        )

    def _image(self, name: str, value: Any) -> Image.Image:
        if isinstance(value, (bytes, memoryview)):
            image = read_image(name, BytesIO(value), self.channels, self.bits)
        else:
            image = upright(self._from_pixels(name, value), self.channels)
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
        found = type(value).__name__
        if isinstance(value, Image.Image):
            found += f" of mode {value.mode}"
        elif isinstance(value, (np.ndarray, Tensor)):
            found += f" of {value.dtype} and shape {tuple(value.shape)}"
        raise TeamNetError(
            f"{name} must have an image: an encoded one (bytes), one of Pillow's of mode L or RGB, "
            f"a uint8 array (H, W) or (H, W, C) or a uint8 tensor (C, H, W), found {found}."
        )


class ChunkSampler(EpochSampler):
    """Chunks in random order, the blocks of images of each, and the images of each block.

    Each chunk is read once in an epoch, by all processes at about the same time.

    Args:
        dataset: What to draw from.
        chunk_sizes: Number of images in each chunk.
        *args: Those of :class:`EpochSampler`.
    """

    def __init__(self, dataset: TransformedSubset, chunk_sizes: list[int], *args: int) -> None:
        super().__init__(dataset, *args)
        chunks = np.split(np.arange(len(dataset)), np.cumsum(chunk_sizes)[:-1])
        self.chunks = [np.split(chunk, range(_BLOCK, len(chunk), _BLOCK)) for chunk in chunks]

    def order(self) -> list[int]:
        """This process's images of the epoch, as many as of each other process."""
        random = np.random.default_rng([self.seed, self.epoch, 1])
        blocks = [
            random.permutation(chunk[block])
            for chunk in map(self.chunks.__getitem__, random.permutation(len(self.chunks)))
            for block in random.permutation(len(chunk))
        ]
        # The first ones again where the processes' shares would differ.
        order = np.resize(np.concatenate(blocks), self.total_size)
        shared: list[int] = order[self.rank :: self.num_replicas].tolist()
        return shared


class LitData(EncodedImageDataModule):
    """Images in litdata's chunks, as ``litdata.optimize`` writes them.

    A sample is a pair (image, label) or a dict with the two. An image is an encoded file (bytes, or
    litdata's ``jpeg`` and ``image``), one of Pillow's of mode L or RGB, a uint8 array of shape
    (H, W) or (H, W, C), or a uint8 tensor of shape (C, H, W). A label is an integer.

    Each split is a folder, read in place, or an address that litdata opens: ``s3://...``,
    ``gs://...`` or ``azure://...``. From there chunks are downloaded whole, when their first image
    is needed, and kept on the disk as space permits.

    An epoch takes the chunks in random order, of each the blocks of 256 images, and of each block
    the images, much as litdata does: have ``optimize`` write the images in random order, not class
    by class. Each process reads each chunk. Labels come with the images: one that doesn't fit is
    found when it is read, and no validation set can be cut from the training images.

    Args:
        num_classes: Number of classes.
        classes: Their names, in the order of the labels; None if they have only numbers.
        train: Folder or address of the training images.
        val: Of the validation images.
        test: Of the test images, only needed to test and predict.
        channels: 3 for RGB, 1 for grey.
        image_size: See :class:`EncodedImageDataModule`. ``None`` for the size of the first training
            image.
        image_key: Name of the image in samples that are dicts.
        label_key: Name of the label.
        cache_dir: Where chunks from elsewhere are kept; ``None`` for ``~/.lightning/chunks``, or
            what ``LITDATA_CACHE_DIR`` says.
        statistics: See :class:`EncodedImageDataModule`.
        **kwargs: Arguments of :class:`EncodedImageDataModule`, but for those that cut or choose
            images.

    Raises:
        ModuleNotFoundError: litdata isn't installed.
        FileNotFoundError: A folder has no index.
        ValueError: An argument is out of its range; in ``setup`` or later, a sample, image or label
            can't be read.
    """

    has_val = True

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
        statistics: Literal["imagenet", "data"] | Statistics = "imagenet",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_size=image_size,
            statistics=statistics,
            val_fraction=None,
            train_size=None,
            split_seed=0,
            **kwargs,
        )
        require("litdata", "litdata")
        self.num_classes = num_classes
        self.classes = classes
        if classes is not None and len(classes) != num_classes:
            raise TeamNetError(
                f"There are {num_classes} classes, but {len(classes)} names of them."
            )
        self.folders = {"train": train, "val": val, "test": test}
        self.keys = {"image_key": image_key, "label_key": label_key}
        self.cache_dir = cache_dir
        height = width = image_size
        if height is None or width is None:
            image, _ = self._images("train", channels)[0]
            height, width = image.height, image.width
        self.input_shape = (channels, height, width)
        if statistics != "data":
            self.set_statistics(None)

    def load_split(self, split: Split) -> tuple[ChunkedImages, npt.NDArray[np.int64]]:
        """Open one split; zeros stand for the labels, which come with the images."""
        images = self._images(split, self.input_shape[0], self.fixed_size)
        return images, np.zeros(len(images), dtype=np.int64)

    def _load_checked(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        # Without a survey, for which many chunks would be downloaded.
        images, labels = super(EncodedImageDataModule, self)._load_checked(split)
        assert isinstance(images, ChunkedImages)
        if self.given_bits is None and split == "train":
            self.find_bits(images.largest_value())
        images.bits = self.bits
        return images, labels

    def _sampler(self) -> EpochSampler:
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
    """What litdata is to open, such that it leaves the folder as it is.

    Raises:
        FileNotFoundError: The folder has no index.
        ValueError: It is an address of another kind.
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
            f"There is no {index}: {address} must be a folder that litdata.optimize wrote."
        )
    config = json.loads(index.read_text()).get("config", {})
    whole = config.get("compression") and config.get("compression_level") in (None, "chunk")
    # It would replace compressed chunks by others, so have it take them for a store's.
    return f"local:{folder}" if whole else str(folder)

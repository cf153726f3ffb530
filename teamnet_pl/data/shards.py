"""Images in tar shards, streamed by webdataset: for datasets larger than a disk."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

from teamnet_pl.data.base import Split
from teamnet_pl.data.encoded import EncodedImageDataModule, Statistics
from teamnet_pl.data.images import SAMPLED_FOR_BITS, largest_value, read_image
from teamnet_pl.data.loading import LoadingError, Resumable, SkippedImages, UnreadableImageError
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require
from teamnet_pl.randomness import seeded

if TYPE_CHECKING:
    from typing_extensions import Self  # not in Python 3.10's typing

_META = re.compile(r"__[^/]*__($|/)")
_IMAGES = ("jpg", "jpeg", "png", "webp")


class ShardStream(IterableDataset[Any]):
    """Streams this process's share of the images in some shards, in order.

    The processes take turns, image by image. If images run out within a turn, ``None`` takes the
    place of an image, so that all processes serve the same number of batches: they wait for each
    other.

    Args:
        shards: Files or addresses.
        num_classes: Number of classes.
        channels: 3 for RGB, 1 for grey.
        bits: Number of bits that hold values in images with 16 bits.
        transform: Applied to each image.
        skipped: Record of the images that cannot be read; ``None`` to raise their errors.
        processes: Number of processes that share the shards.
        rank: Rank of this process.
    """

    def __init__(
        self,
        shards: Sequence[str],
        num_classes: int,
        channels: int,
        bits: int,
        transform: v2.Transform,
        skipped: SkippedImages | None,
        processes: int,
        rank: int,
    ) -> None:
        self.shards = shards
        self.num_classes = num_classes
        self.channels = channels
        self.bits = bits
        self.transform = transform
        self.skipped = skipped
        self.processes = processes
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        """Yields (image, label) of this process's share of this worker's shards, or ``None``."""
        worker, workers = _worker()
        samples = self.encoded(self.shards[worker::workers])
        while turn := list(islice(samples, self.processes)):
            yield self.decoded(turn[self.rank]) if self.rank < len(turn) else None

    def encoded(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields the samples in some shards, as dicts of webdataset."""
        for shard in shards:
            yield from read_samples(shard)

    def decoded(self, sample: dict[str, Any], seed: int | None = None) -> tuple[Any, int] | None:
        """Decodes a sample.

        Args:
            sample: The sample, as a dict of webdataset.
            seed: Seed of the augmentation; ``None`` to draw from this process's random states.

        Returns:
            Image and label, or ``None`` if the image is skipped.

        Raises:
            UnreadableImageError: If the image cannot be read and is not to be skipped, or the
                sample does not hold an image and a class.
        """
        name = f"{sample['__url__']}, {sample['__key__']}"
        ending = _image_ending(sample)
        label = sample.get("cls", b"").decode(errors="replace").strip()
        if ending is None or not label.isdecimal() or int(label) >= self.num_classes:
            endings = [key for key in sample if not key.startswith("__")]
            raise UnreadableImageError(
                f"{name} must have an image ({', '.join(_IMAGES)}) and a class (cls) in "
                f"0..{self.num_classes - 1}, found {', '.join(endings)} with class {label!r}."
            )
        try:
            image = read_image(
                f"{name}.{ending}", BytesIO(sample[ending]), self.channels, self.bits
            )
        except UnreadableImageError as error:
            if self.skipped is None:
                raise
            self.skipped.add(error)
            return None
        with seeded(seed):
            return self.transform(image), int(label)


class TrainStream(ShardStream):
    """Streams whole batches of shuffled images, the same number on each process.

    Each epoch takes the shards in another order and draws images from a buffer. A worker that
    reaches the end of its shards before its share of the epoch is full begins again.

    Args:
        *args: Arguments of `ShardStream`.
        seed: Seed of the run.
        batch_size: Images per batch.
        batches: Number of batches in an epoch of this process.
        buffer: Number of images in the buffer that the next image is drawn from.
    """

    def __init__(self, *args: Any, seed: int, batch_size: int, batches: int, buffer: int) -> None:
        super().__init__(*args)
        self.seed = seed
        self.batch_size = batch_size
        self.batches = batches
        self.buffer = buffer
        self.epoch = 0
        self.start = 0  # position among the images of this process at which the next pass begins

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which order and augmentation depend besides the seed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """Yields (image, label, seed) of each image of this worker's batches."""
        worker, workers = _worker()
        # The loader takes batches from the workers in turn, beginning with the first.
        done = self.start // self.batch_size
        worker = (worker + done) % workers
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards))
        shards = [self.shards[i] for i in order][self.rank :: self.processes][worker::workers]
        before = len(range(worker, done, workers)) * self.batch_size
        share = len(range(worker, self.batches, workers)) * self.batch_size
        images = self._shuffled(shards, before)
        yield from islice(images, before, share)

    def _shuffled(self, shards: list[str], before: int) -> Iterator[Any]:
        """Yields images without end; the first ones are not decoded if none can be skipped."""
        shuffle = require("webdataset", "webdataset").detshuffle
        yielded = 0
        for repetition in count():
            seed = zlib.crc32(f"{self.seed} {self.epoch} {repetition}".encode())
            empty = True
            for sample in shuffle(self.buffer, self.buffer, seed).run(self.encoded(shards)):
                empty = False
                if yielded < before and self.skipped is None:
                    yielded += 1
                    yield None
                    continue
                image_seed = zlib.crc32(f"{seed} {sample['__url__']} {sample['__key__']}".encode())
                if (decoded := self.decoded(sample, image_seed)) is not None:
                    yielded += 1
                    yield (*decoded, image_seed)
            if empty:
                raise LoadingError(f"There is no image in {', '.join(shards)}.")


class StreamLoader(Resumable):
    """Loads a `TrainStream`, with new workers for each epoch, since a worker knows only one epoch.

    Args:
        stream: The stream.
        **options: Arguments of ``DataLoader``.
    """

    def __init__(self, stream: TrainStream, **options: Any) -> None:
        self.sampler = stream
        self.batch_size = stream.batch_size
        self.options = options | {"persistent_workers": False}

    def __len__(self) -> int:
        return int(self.sampler.batches)

    def one_pass(self) -> Iterator[Any]:
        """Returns the batches of an epoch from the position at which the stream starts."""
        return iter(DataLoader(self.sampler, **self.options))


class Shards(EncodedImageDataModule):
    """Images in tar shards in webdataset's format, on a disk or streamed from elsewhere.

    Each image has two files of the same name in a shard, such as ``0017.jpg`` and ``0017.cls``; the
    latter holds the class as text. Shards are files or addresses that webdataset opens, with
    ranges in braces: ``/data/train-{0000..0146}.tar``, ``https://...``, ``s3://...``,
    ``pipe:...``.

    The same seed gives the same batches on the same number of processes and workers, also after a
    resume within an epoch, which reads the earlier images again but does not decode them. There
    must be a training shard for each worker of each process. For validation and test, each process
    reads all shards, but decodes only its share of the images. Prediction is not available, since
    the images have no index.

    Args:
        num_classes: Number of classes.
        classes: Names of the classes in the order of the labels; None if classes only have numbers.
        train_images: Number of images in an epoch, rounded down to whole batches of all processes.
        train: The training shards.
        val: The validation shards.
        test: The test shards, only needed to test.
        channels: 3 for RGB, 1 for grey.
        image_size: Height and width in pixels that images are brought to.
        buffer: Number of encoded images that each worker draws the next image from.
        statistics: Mean and standard deviation for normalization: "imagenet", or values for each
            channel.
        **kwargs: Arguments of `EncodedImageDataModule`. With ``on_error: skip``, the next image of
            the stream takes the place of a skipped one in training.

    Raises:
        ModuleNotFoundError: If webdataset is not installed.
        FileNotFoundError: In ``setup``, if a shard on a disk is missing.
        TeamNetError: If an argument is out of its range, or, in ``setup`` or later, a shard, image
            or class cannot be read, or there are too few shards.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        train_images: int,
        train: str,
        val: str,
        test: str | None = None,
        classes: list[str] | None = None,
        channels: Literal[1, 3] = 3,
        image_size: int = 224,
        buffer: int = 1000,
        statistics: Literal["imagenet"] | Statistics = "imagenet",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, statistics=statistics, **kwargs)
        library = require("webdataset", "webdataset")
        if buffer < 1:
            raise TeamNetError(f"buffer must be at least 1, found {buffer}.")
        self.set_classes(num_classes, classes)
        self.input_shape = (channels, image_size, image_size)
        self.train_images = train_images
        self.buffer = buffer
        self.shards = {
            split: [] if urls is None else library.shardlists.expand_urls(urls)
            for split, urls in {"train": train, "val": val, "test": test}.items()
        }

    def setup(self, stage: str) -> None:
        """Checks the first image of each split that the stage needs (Lightning's hook)."""
        super().setup(stage)
        train_samples = self._detect_bits_of_samples()
        if stage in ("fit", "validate"):
            self.val_stream = self._checked_stream("val", self._eval_pipeline())
            self._checked_stream("train", self._train_pipeline(), train_samples)
        else:
            self.test_stream = self._checked_stream("test", self._eval_pipeline())

    def train_dataloader(self) -> StreamLoader:
        """Returns the loader of shuffled, augmented training batches."""
        options = self._loader_options(self._mixes())
        processes, _ = self._processes()
        batches = self.train_images // (processes * self.batch_size)
        if batches < 1:
            raise TeamNetError(
                f"train_images must be at least one batch of each process, {processes} x "
                f"{self.batch_size}, found {self.train_images}."
            )
        self._check_validation_interval(batches)
        readers = processes * max(1, options["num_workers"])
        if len(self.shards["train"]) < readers:
            raise TeamNetError(
                f"There are {len(self.shards['train'])} training shards, but {readers} workers of "
                "all processes, each of which needs one: set num_workers, or make more shards."
            )
        stream = TrainStream(
            *self._stream_arguments("train", self._train_pipeline()),
            seed=self._seed,
            batch_size=self.batch_size,
            batches=batches,
            buffer=self.buffer,
        )
        return StreamLoader(stream, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of validation batches."""
        return DataLoader(self.val_stream, **self._loader_options())

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of test batches."""
        return DataLoader(self.test_stream, **self._loader_options())

    def predict_dataloader(self) -> NoReturn:
        """Refuses prediction, whose results are listed by the index of the image.

        Raises:
            TeamNetError: Always.
        """
        raise TeamNetError(
            "Shards cannot be used for prediction, since their images have no index: unpack them "
            "to a folder, for ImageFolder."
        )

    def _detect_bits_of_samples(self) -> list[dict[str, Any]]:
        """Detects the bits unless they are given; returns the training samples read for it."""
        if self.given_bits is not None or self._missing("train"):
            return []
        samples = first_samples(self.shards["train"], SAMPLED_FOR_BITS)
        endings = [_image_ending(sample) for sample in samples]
        self.detect_bits(
            largest_value(
                BytesIO(sample[ending])
                for sample, ending in zip(samples, endings, strict=True)
                if ending is not None
            )
        )
        return samples

    def _checked_stream(
        self, split: Split, transform: v2.Transform, samples: Sequence[dict[str, Any]] = ()
    ) -> ShardStream:
        """Makes the stream of a split after a check of its first image.

        Args:
            split: "train", "val" or "test".
            transform: Applied to each image.
            samples: The first samples, if they have been read already.
        """
        if not (shards := self.shards[split]):
            raise TeamNetError(f"There are no {split} shards: set {split}.")
        if missing := self._missing(split):
            raise FileNotFoundError(f"There are no {split} shards {', '.join(missing)}.")
        if not (samples := samples or first_samples(shards, 1)):
            raise TeamNetError(f"There is no image in {', '.join(shards)}.")
        stream = ShardStream(*self._stream_arguments(split, transform))
        if (decoded := stream.decoded(samples[0], seed=0)) is not None:
            self._check_shape(decoded[0], f"the transform of {split} images")
        return stream

    def _stream_arguments(self, split: Split, transform: v2.Transform) -> tuple[Any, ...]:
        """Returns the arguments of `ShardStream`."""
        return (
            self.shards[split],
            self.num_classes,
            self.input_shape[0],
            self.bits,
            transform,
            self.skipped,
            *self._processes(),
        )

    def _missing(self, split: Split) -> list[str]:
        """Lists the shards that should be on a disk and are not."""
        return [url for url in self.shards[split] if ":" not in url and not Path(url).is_file()]


def first_samples(shards: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Reads the first samples of the first shard that has any.

    Args:
        shards: Files or addresses.
        count: The largest number of samples to read.

    Returns:
        The samples as dicts of webdataset.

    Raises:
        LoadingError: If a shard cannot be read.
    """
    for shard in shards:
        if samples := list(islice(read_samples(shard), count)):
            return samples
    return []


def read_samples(shard: str) -> Iterator[dict[str, Any]]:
    """Reads the samples of a shard.

    Args:
        shard: File or address.

    Yields:
        The samples as dicts of webdataset.

    Raises:
        LoadingError: If the shard cannot be read.
    """
    library = require("webdataset", "webdataset")
    try:
        # Not by `tarfile_samples`, which leaves the file open.
        with library.gopen(shard) as stream:
            yield from library.tariterators.group_by_keys(_files(shard, stream))
    except Exception as error:  # tarfile and connections can raise errors of any class
        raise LoadingError(f"{shard} cannot be read as a tar of images: {error}") from error


def _image_ending(sample: dict[str, Any]) -> str | None:
    return next((ending for ending in _IMAGES if ending in sample), None)


class _Member(tarfile.TarInfo):
    """A file in an archive that must have an end mark.

    Without this check, an archive that was cut between two files would pass for a shorter one:
    webdataset's iterator and `tarfile` take it as complete.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Reads the next header; only zeros may end an archive."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # undocumented
            raise tarfile.ReadError(
                "it ends without an end mark, so a part of it is missing; copy it again"
            ) from error


def _files(shard: str, stream: Any) -> Iterator[dict[str, Any]]:
    """Yields the files of a tar, as webdataset's `tar_file_expander` does."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and not _META.match(member.name):
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
            archive.members = []  # type: ignore[attr-defined]  # they would fill the memory
    yield {}


def _worker() -> tuple[int, int]:
    """Returns the index of this worker and the number of workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)

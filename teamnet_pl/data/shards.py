"""Images in tar shards, read as a stream by webdataset: for more than fits a disk."""

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
from teamnet_pl.data.images import (
    EncodedImageDataModule,
    Statistics,
    largest_value,
    read_image,
)
from teamnet_pl.data.loading import Resumable, Skipped, UnreadableImageError
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require
from teamnet_pl.randomness import seeded

if TYPE_CHECKING:
    from typing_extensions import Self  # not in Python 3.10's typing

_META = re.compile(r"__[^/]*__($|/)")
_IMAGES = ("jpg", "jpeg", "png", "webp")


class ShardStream(IterableDataset[Any]):
    """This process's share of the images in some shards, in order.

    The processes take turns, image by image. Where images run out within a turn, a ``None`` takes
    the place of one, so that each process serves as many batches as the others, which wait for it.

    Args:
        shards: Files or addresses.
        num_classes: Number of classes.
        channels: 3 for RGB, 1 for grey.
        bits: How many bits of images with 16 hold values.
        transform: Applied to each image.
        skipped: Where to note images that can't be read; ``None`` for an error.
        processes: Number of processes that share the shards.
        rank: This one among them.
    """

    def __init__(
        self,
        shards: Sequence[str],
        num_classes: int,
        channels: int,
        bits: int,
        transform: v2.Transform,
        skipped: Skipped | None,
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
        """(image, label) of this process's images in this worker's shards; ``None`` for none."""
        worker, workers = _worker()
        samples = self.encoded(self.shards[worker::workers])
        while turn := list(islice(samples, self.processes)):
            yield self.decoded(turn[self.rank]) if self.rank < len(turn) else None

    def encoded(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Samples as webdataset gives them."""
        for shard in shards:
            yield from _samples(shard)

    def decoded(self, sample: dict[str, Any], seed: int | None = None) -> tuple[Any, int] | None:
        """Image and label of a sample, or ``None`` if it was skipped."""
        name = f"{sample['__url__']}, {sample['__key__']}"
        ending = next((ending for ending in _IMAGES if ending in sample), None)
        label = sample.get("cls", b"").decode(errors="replace").strip()
        if ending is None or not label.isdecimal() or int(label) >= self.num_classes:
            found = {key: value for key, value in sample.items() if not key.startswith("__")}
            raise UnreadableImageError(
                f"{name} must have an image ({', '.join(_IMAGES)}) and a class (cls) in "
                f"0..{self.num_classes - 1}, found {', '.join(found)} with class {label!r}."
            )
        try:
            image = read_image(
                f"{name}.{ending}", BytesIO(sample[ending]), self.channels, self.bits
            )
        except UnreadableImageError as problem:
            if self.skipped is None:
                raise
            self.skipped.add(problem)
            return None
        with seeded(seed):
            return self.transform(image), int(label)


class TrainStream(ShardStream):
    """Whole batches of shuffled images, as many on each process.

    Each epoch takes the shards in another order and draws from a buffer of images. A worker that
    comes to the end of its shards before its share of the epoch is full begins again.

    Args:
        *args: Those of :class:`ShardStream`.
        seed: The run's seed.
        batch_size: Images in a batch.
        batches: Batches in an epoch of this process.
        buffer: How many images to draw the next one from.
    """

    def __init__(self, *args: Any, seed: int, batch_size: int, batches: int, buffer: int) -> None:
        super().__init__(*args)
        self.seed = seed
        self.batch_size = batch_size
        self.batches = batches
        self.buffer = buffer
        self.epoch = 0
        self.start = 0  # at which of this process's images the next pass begins

    def set_epoch(self, epoch: int) -> None:
        """Sets what the order and the augmentation depend on, besides the seed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """(image, label, seed) of each image of this worker's batches."""
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
        """An endless stream, of which the first images needn't be decoded."""
        shuffle = require("webdataset", "webdataset").detshuffle
        number = 0
        for turn in count():
            seed = zlib.crc32(f"{self.seed} {self.epoch} {turn}".encode())
            stage = shuffle(self.buffer, self.buffer, seed)
            found = False
            for sample in stage.run(self.encoded(shards)):
                found = True
                if number < before and self.skipped is None:
                    number += 1
                    yield None
                    continue
                own = zlib.crc32(f"{seed} {sample['__url__']} {sample['__key__']}".encode())
                if (decoded := self.decoded(sample, own)) is not None:
                    number += 1
                    yield (*decoded, own)
            if not found:
                raise TeamNetError(f"There is no image in {', '.join(shards)}.")


class StreamLoader(Resumable):
    """Loads a `TrainStream`, with new workers for each epoch, as they know but one.

    Args:
        stream: What to load.
        **options: Arguments of ``DataLoader``.
    """

    def __init__(self, stream: TrainStream, **options: Any) -> None:
        self.sampler = stream
        self.batch_size = stream.batch_size
        self.options = options | {"persistent_workers": False}

    def __len__(self) -> int:
        return int(self.sampler.batches)

    def one_pass(self) -> Iterator[Any]:
        """The batches of an epoch from where the stream starts."""
        return iter(DataLoader(self.sampler, **self.options))


class Shards(EncodedImageDataModule):
    """Images in tar shards in webdataset's format, on a disk or streamed from elsewhere.

    Each image has two files of one name in a shard, such as ``0017.jpg`` and ``0017.cls``, the
    latter with the class as text. Shards are named by braces, files or addresses that webdataset
    opens: ``/data/train-{0000..0146}.tar``, ``https://...``, ``s3://...``, ``pipe:...``.

    The same seed gives the same batches on as many processes with as many workers, also after a
    resume within an epoch, which reads what came before again but doesn't decode it. There must be
    a training shard for each worker of each process. For validation and test each process reads all
    shards, but decodes its share of the images alone. Shards can't be predicted, as their images
    have no index.

    Args:
        num_classes: Number of classes.
        classes: Their names, in the order of the labels; None if they have only numbers.
        train_images: Images in an epoch; of each, only whole batches of all processes.
        train: The training shards.
        val: The validation shards.
        test: The test shards, only needed to test.
        channels: 3 for RGB, 1 for grey.
        image_size: Height and width in pixels that images are brought to.
        buffer: How many encoded images each worker draws the next one from.
        statistics: What to normalise by: "imagenet", or mean and standard deviation of each
            channel.
        **kwargs: Arguments of :class:`EncodedImageDataModule`, but for those that cut or choose
            images. With ``on_error: skip`` the training stream goes on.

    Raises:
        ModuleNotFoundError: webdataset isn't installed.
        FileNotFoundError: In ``setup``: a shard on a disk is missing.
        ValueError: An argument is out of its range; in ``setup`` or later, a shard, image or class
            can't be read, or there are too few shards.
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
        super().__init__(
            image_size=image_size,
            statistics=statistics,
            val_fraction=None,
            train_size=None,
            split_seed=0,
            **kwargs,
        )
        library = require("webdataset", "webdataset")
        if buffer < 1:
            raise TeamNetError(f"buffer must be at least 1, got {buffer}.")
        self.num_classes = num_classes
        self.classes = classes
        if classes is not None and len(classes) != num_classes:
            raise TeamNetError(
                f"There are {num_classes} classes, but {len(classes)} names of them."
            )
        self.input_shape = (channels, image_size, image_size)
        self.train_images = train_images
        self.buffer = buffer
        self.shards = {
            split: [] if urls is None else library.shardlists.expand_urls(urls)
            for split, urls in {"train": train, "val": val, "test": test}.items()
        }

    def setup(self, stage: str) -> None:
        """Look at the first image of each split that the stage needs (Lightning's hook)."""
        self.skipped = Skipped() if self.on_error == "skip" else None
        self.draw_seed()
        self.set_statistics(None)
        evaluation = v2.Compose([v2.ToImage(), *self.eval_transform()])
        if self.shards["train"] and self.given_bits is None and not self._missing("train"):
            self.find_bits(_largest_value(self.shards["train"][0]))
        if stage in ("fit", "validate"):
            self.val_stream = self._stream("val", evaluation)
            self._stream("train", self._augmentation())
        else:
            self.test_stream = self._stream("test", evaluation)

    def load_split(self, split: Split) -> NoReturn:
        """Raises: shards are a stream, and not to be had at once."""
        raise NotImplementedError("Shards are streamed.")

    def train_dataloader(self) -> StreamLoader:  # type: ignore[override]
        """Shuffled, augmented training batches."""
        options = self._loader_options(self._mixes())
        processes, _ = self._processes()
        batches = self.train_images // (processes * self.batch_size)
        if batches < 1:
            raise TeamNetError(
                f"train_images must be at least one batch of each process, {processes} x "
                f"{self.batch_size}, got {self.train_images}."
            )
        readers = processes * max(1, options["num_workers"])
        if len(self.shards["train"]) < readers:
            raise TeamNetError(
                f"There are {len(self.shards['train'])} training shards, but {readers} workers of "
                "all processes, which need one each: set num_workers, or make more shards."
            )
        stream = TrainStream(
            *self._share("train", self._augmentation()),
            seed=self._seed,
            batch_size=self.batch_size,
            batches=batches,
            buffer=self.buffer,
        )
        return StreamLoader(stream, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return DataLoader(self.val_stream, **self._loader_options())

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return DataLoader(self.test_stream, **self._loader_options())

    def predict_dataloader(self) -> NoReturn:
        """Raises: predictions are listed by the index of the image, and there is none."""
        raise TeamNetError(
            "Shards can't be predicted, as their images have no index: unpack them to a folder, "
            "for ImageFolder."
        )

    def _share(self, split: Split, transform: v2.Transform) -> tuple[Any, ...]:
        """Arguments of `ShardStream`."""
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
        """Shards that should be on a disk and are not."""
        return [url for url in self.shards[split] if ":" not in url and not Path(url).is_file()]

    def _stream(self, split: Split, transform: v2.Transform) -> ShardStream:
        """The stream of a split, whose first image is right."""
        if not (shards := self.shards[split]):
            raise TeamNetError(f"There are no {split} shards: set {split}.")
        if missing := self._missing(split):
            raise FileNotFoundError(f"There are no {split} shards {', '.join(missing)}.")
        stream = ShardStream(*self._share(split, transform))
        first = next(stream.encoded(shards), None)
        if first is None:
            raise TeamNetError(f"There is no image in {', '.join(shards)}.")
        sample = stream.decoded(first, seed=0)
        if sample is not None and (shape := tuple(sample[0].shape)) != self.input_shape:
            raise TeamNetError(
                f"Shards: the transform of {split} images gives one of shape {shape}, not "
                f"{self.input_shape}. It has to crop or resize to it."
            )
        return stream


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    library = require("webdataset", "webdataset")
    try:
        # Not by `tarfile_samples`, which leaves the file open.
        with library.gopen(shard) as stream:
            yield from library.tariterators.group_by_keys(_files(shard, stream))
    except Exception as error:  # whatever tarfile or a connection raises
        raise TeamNetError(f"{shard} can't be read as a tar of images: {error}") from error


class _Member(tarfile.TarInfo):
    """A file in an archive that has to have an end.

    Else an archive that was cut between two files would be a shorter one: webdataset's own iterator
    and `tarfile` take it for whole.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Reads the next header; only zeros may end an archive."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # undocumented
            raise tarfile.ReadError(
                "it ends without the mark of its end, so a part of it is missing; copy it again"
            ) from error


def _files(shard: str, stream: Any) -> Iterator[dict[str, Any]]:
    """Files as webdataset's `tar_file_expander` gives them."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and not _META.match(member.name):
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
            archive.members = []  # type: ignore[attr-defined]  # they would pile up
    yield {}


def _largest_value(shard: str) -> int | None:
    """The largest value of the first images with 16 bits in a shard; ``None`` without such."""
    values = [
        largest_value(BytesIO(sample[ending]))
        for sample in islice(_samples(shard), 16)
        for ending in _IMAGES
        if ending in sample
    ]
    return max((value for value in values if value is not None), default=None)


def _worker() -> tuple[int, int]:
    """Which worker this is, of how many."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)

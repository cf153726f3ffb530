"""The order, augmentation and batching of images, independent of how they are stored."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    default_collate,
)
from torchvision.transforms import v2

from teamnet_pl.errors import TeamNetError
from teamnet_pl.randomness import seeded


@dataclass(frozen=True, slots=True)
class SeededIndex:
    """The index of an image in an epoch, with the seed of its augmentation.

    Attributes:
        index: Index of the image.
        seed: Seed of its augmentation.
    """

    index: int
    seed: int


class EpochSampler(DistributedSampler[SeededIndex]):
    """Samples the images of an epoch in random order, each with a seed.

    Order and seeds depend on the seed of the run, the epoch and the image alone: not on the number
    of processes or workers, nor on other code that draws random numbers. Lightning sets the epoch.

    Args:
        dataset: The images to sample from.
        seed: Seed of the run.
        num_replicas: Number of processes.
        rank: Rank of this process.
    """

    def __init__(self, dataset: TransformedSubset, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.images = len(dataset)
        self.start = 0  # position among the images of this process at which the next pass begins

    def __iter__(self) -> Iterator[SeededIndex]:
        random = np.random.default_rng([self.seed, self.epoch])
        seeds = random.integers(2**32, size=self.images)
        for index in self.order()[self.start :]:
            yield SeededIndex(index, int(seeds[index]))

    def order(self) -> list[int]:
        """Returns the images of this process in an epoch, the same number for each process."""
        return list(super().__iter__())  # type: ignore[arg-type]


class SequentialEpochSampler(EpochSampler, SequentialSampler):  # type: ignore[misc]
    """Samples the images of an epoch in the order of the dataset, to train on the first few.

    Lightning's ``overfit_batches`` replaces every sampler that is not a sequential one.
    """

    def order(self) -> list[int]:
        """Returns the images of this process in an epoch, the same number for each process."""
        return list(
            np.resize(np.arange(self.images), self.total_size)[self.rank :: self.num_replicas]
        )


class EvaluationSampler(DistributedSampler[Any], SequentialSampler):
    """Samples the images of this process in order: all processes together serve each image once.

    Lightning leaves this sampler alone; the one it would insert serves some images twice.

    Args:
        dataset: The images to serve.
        num_replicas: Number of processes.
        rank: Rank of this process.
        even: Whether each process serves the same number, with ``None`` for a missing image, since
            processes wait for each other at each batch. Otherwise, only a process without any image
            serves a single ``None``.
    """

    def __init__(
        self, dataset: TransformedSubset, num_replicas: int, rank: int, even: bool = True
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.images = len(dataset)
        if not even:
            self.num_samples = max(1, len(range(rank, self.images, num_replicas)))

    def __iter__(self) -> Iterator[Any]:
        for position in range(self.num_samples):
            index = self.rank + position * self.num_replicas
            yield index if index < self.images else None


class Resumable(ABC):
    """A loader that resumes within an epoch; Lightning keeps its state in the checkpoints.

    torchdata's ``StatefulDataLoader`` keeps the random state of each worker and therefore needs the
    same number of workers again. Since each image has its own seed, the number of batches served is
    all the state that is needed here.

    Attributes:
        sampler: Has the epoch, which Lightning sets, and the position to start at.
        batch_size: Images per batch.
    """

    sampler: Any
    batch_size: int | None
    _served = 0
    _resumed: dict[str, int] | None = None

    @abstractmethod
    def one_pass(self) -> Iterator[Any]:
        """Returns the batches of an epoch from the position at which the sampler starts."""

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and the number of its batches that were served."""
        return {"epoch": self.sampler.epoch, "batches": self._served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next pass resume, if it goes through the same epoch."""
        self._resumed = state_dict

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of the sampler's epoch."""
        # As a generator, it begins with the first batch: Lightning sets the epoch after `iter`.
        resumed, self._resumed = self._resumed, None
        same_epoch = resumed is not None and resumed["epoch"] == self.sampler.epoch
        self._served = resumed["batches"] if resumed is not None and same_epoch else 0
        self.sampler.start = self._served * (self.batch_size or 1)
        for batch in self.one_pass():
            self._served += 1
            yield batch
        # Without Lightning, each pass is an epoch.
        self._served = 0
        self.sampler.set_epoch(self.sampler.epoch + 1)


class ResumableLoader(Resumable, DataLoader[Any]):  # type: ignore[misc]
    """Loads the images of an `EpochSampler`."""

    def one_pass(self) -> Iterator[Any]:
        """Returns the batches of an epoch from the position at which the sampler starts."""
        return DataLoader.__iter__(self)


class LoadingError(TeamNetError):
    """Data that cannot be loaded, found in the main process or in a worker of a loader.

    Args:
        message: The message, or the report of a worker that ends with it: to raise the error of a
            worker again, torch makes another error of the same class with the traceback in front of
            the message. Only the message is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            message = message.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n")
        super().__init__(message)


class UnreadableImageError(LoadingError):
    """An image that cannot be read; the message begins with its name."""


class SkippedImages:
    """Record of the images that were skipped by this process and its workers."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="teamnet-skipped-")
        os.close(handle)
        self._file = Path(name)

    def add(self, error: UnreadableImageError) -> None:
        """Records an image by its error."""
        with self._file.open("a") as file:
            file.write(" ".join(str(error).split()) + "\n")

    def pop(self) -> list[str]:
        """Returns the sorted messages without repetition, and deletes the record."""
        messages = sorted(set(self._file.read_text().splitlines()))
        self._file.unlink()
        return messages


class TransformedSubset(Dataset[Any]):
    """Some images of a dataset, each transformed as it is read.

    Args:
        dataset: Map-style dataset of (image, label).
        indices: Indices of the samples to serve, in this order.
        transform: Applied to each image.
        skipped: Record of the images that cannot be read; ``None`` to raise their errors.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: npt.NDArray[np.int64],
        transform: v2.Transform,
        skipped: SkippedImages | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.transform = transform
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | SeededIndex | None) -> tuple[Any, ...] | None:
        """Returns a sample.

        Args:
            item: Index of the image; ``None`` is answered by ``None``.

        Returns:
            Image and label, or ``None`` if the image is skipped. For a `SeededIndex`: image, label
            and seed, where the next readable image takes the place of a skipped one.

        Raises:
            UnreadableImageError: If the image cannot be read and is not to be skipped, or no image
                can be read.
        """
        if item is None:
            return None
        if not isinstance(item, SeededIndex):
            return self._sample(item)
        for index in range(item.index, item.index + len(self)):
            with seeded(item.seed):
                sample = self._sample(index % len(self))
            if sample is not None:
                return (*sample, item.seed)
        raise UnreadableImageError(f"None of the {len(self)} images can be read.")

    def _sample(self, index: int) -> tuple[Tensor, Any] | None:
        try:
            image, label = self.dataset[int(self.indices[index])]
        except UnreadableImageError as error:
            if self.skipped is None:
                raise
            self.skipped.add(error)
            return None
        return self.transform(image), label


class Collate:
    """Makes a batch of samples, and mixes its images.

    Args:
        shape: (channels, height, width) of the images.
        mix: MixUp, CutMix and the like; each batch gets one of them.
    """

    def __init__(self, shape: Sequence[int], mix: Sequence[v2.Transform] = ()) -> None:
        self.shape = shape
        self.mix = v2.RandomChoice(list(mix)) if mix else None

    def __call__(self, samples: list[tuple[Any, ...] | None]) -> tuple[Tensor, Tensor]:
        """Stacks samples of (image, label) or (image, label, seed); ``None`` is left out."""
        present = [sample for sample in samples if sample is not None]
        if not present:
            return torch.empty(0, *self.shape), torch.empty(0, dtype=torch.int64)
        images, labels = default_collate([sample[:2] for sample in present])
        if self.mix is not None:
            images = v2.functional.to_dtype(images, torch.float32, scale=True)
            with seeded(present[0][2] if len(present[0]) > 2 else None):
                images, labels = self.mix(images, labels)
        return images, labels

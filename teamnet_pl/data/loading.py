"""How images are ordered, augmented and batched: the same whatever loads them."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Draw(NamedTuple):
    """One image of one epoch.

    Attributes:
        image: Its index.
        seed: What its augmentation is drawn with.
    """

    image: int
    seed: int


class EpochSampler(DistributedSampler[Draw]):
    """The images of an epoch in random order, each with a seed.

    Both depend on the run's seed, the epoch and the image alone: not on the number of processes
    or workers, nor on what else draws random numbers. Lightning sets the epoch.

    Args:
        dataset: What to draw from.
        seed: The run's seed.
        num_replicas: Number of processes.
        rank: This process among them.
    """

    def __init__(self, dataset: TransformedSubset, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.images = len(dataset)
        self.start = 0  # at which of this process's images the next pass begins

    def __iter__(self) -> Iterator[Draw]:
        random = np.random.default_rng([self.seed, self.epoch])
        seeds = random.integers(2**32, size=self.images)
        for index in self.order()[self.start :]:
            yield Draw(index, int(seeds[index]))

    def order(self) -> list[int]:
        """This process's images of the epoch, as many as of each other process."""
        return list(super().__iter__())  # type: ignore[arg-type]


class SameOrderSampler(EpochSampler, SequentialSampler):  # type: ignore[misc]
    """The images of an epoch in the dataset's order, to train on the first few alone.

    Lightning's `overfit_batches` takes any other sampler away, unless it is a sequential one.
    """

    def order(self) -> list[int]:
        """This process's images of the epoch, as many as of each other process."""
        return list(
            np.resize(np.arange(self.images), self.total_size)[self.rank :: self.num_replicas]
        )


class EvaluationSampler(DistributedSampler[Any], SequentialSampler):
    """This process's images in the dataset's order: over all processes each image once.

    Lightning leaves it as it is; what it uses by itself serves some images twice.

    Args:
        dataset: What to serve.
        num_replicas: Number of processes.
        rank: This process among them.
        even: Whether each process serves as many, those that lack an image a ``None``: where a
            process waits for the others with each batch. Else only a process without any image
            serves one ``None``.
    """

    def __init__(
        self, dataset: TransformedSubset, num_replicas: int, rank: int, even: bool = True
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.images = len(dataset)
        if not even:
            self.num_samples = max(1, len(range(rank, self.images, num_replicas)))

    def __iter__(self) -> Iterator[Any]:
        for place in range(self.num_samples):
            index = self.rank + place * self.num_replicas
            yield index if index < self.images else None


class Resumable(ABC):
    """A loader that goes on within an epoch; Lightning keeps its state in the checkpoints.

    torchdata's ``StatefulDataLoader`` keeps the random state of each worker and so wants as many
    workers again; as each image has its seed, there is nothing to keep but how far the epoch came.

    Attributes:
        sampler: Has the epoch, which Lightning sets, and the image to start at.
        batch_size: Images in a batch.
    """

    sampler: Any
    batch_size: int | None
    _served = 0
    _resumed: dict[str, int] | None = None

    @abstractmethod
    def one_pass(self) -> Iterator[Any]:
        """The batches of an epoch from where the sampler starts."""

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were served."""
        return {"epoch": self.sampler.epoch, "batches": self._served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Has the next pass go on, if it is through the same epoch."""
        self._resumed = state_dict

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch that the sampler is at."""
        # As a generator, it begins with the first batch: Lightning sets the epoch after `iter`.
        resumed, self._resumed = self._resumed, None
        goes_on = resumed is not None and resumed["epoch"] == self.sampler.epoch
        self._served = resumed["batches"] if resumed is not None and goes_on else 0
        self.sampler.start = self._served * (self.batch_size or 1)
        for batch in self.one_pass():
            self._served += 1
            yield batch
        # Without Lightning, each pass is an epoch.
        self._served = 0
        self.sampler.set_epoch(self.sampler.epoch + 1)


class ResumableLoader(Resumable, DataLoader[Any]):  # type: ignore[misc]
    """Loads what an `EpochSampler` draws."""

    def one_pass(self) -> Iterator[Any]:
        """The batches of an epoch from where the sampler starts."""
        return DataLoader.__iter__(self)


class UnreadableImageError(TeamNetError):
    """An image that can't be read, by name."""


class Skipped:
    """Notes the images that were skipped by this process and its workers."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="teamnet-skipped-")
        os.close(handle)
        self._file = Path(name)

    def add(self, problem: UnreadableImageError) -> None:
        """Notes one."""
        with self._file.open("a") as file:
            file.write(" ".join(str(problem).split()) + "\n")

    def pop(self) -> list[str]:
        """What was noted, each once; this is the end of it."""
        problems = sorted(set(self._file.read_text().splitlines()))
        self._file.unlink()
        return problems


class TransformedSubset(Dataset[Any]):
    """Some images of a dataset, each transformed as it is read.

    Args:
        dataset: Map-style dataset of (image, label).
        indices: Which of its samples to serve, in this order.
        transform: Applied to the image.
        skipped: Where to note images that can't be read; ``None`` for an error.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: npt.NDArray[np.int64],
        transform: v2.Transform,
        skipped: Skipped | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.transform = transform
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | Draw | None) -> tuple[Any, ...] | None:
        """Image and label; ``None`` if skipped, or asked for by ``None``.

        Asked for with a seed, there is always one, if need be of the next image, and the seed.
        """
        if item is None:
            return None
        if not isinstance(item, Draw):
            return self._sample(item)
        for index in range(item.image, item.image + len(self)):
            with seeded(item.seed):
                sample = self._sample(index % len(self))
            if sample is not None:
                return (*sample, item.seed)
        raise UnreadableImageError(f"None of {len(self)} images can be read.")

    def _sample(self, index: int) -> tuple[Tensor, Any] | None:
        try:
            image, label = self.dataset[int(self.indices[index])]
        except UnreadableImageError as problem:
            if self.skipped is None:
                raise
            self.skipped.add(problem)
            return None
        return self.transform(image), label


class Collate:
    """Makes a batch of samples, and mixes its images.

    Args:
        shape: (channels, height, width) of the images.
        mix: MixUp, CutMix and the like, of which each batch gets one.
    """

    def __init__(self, shape: Sequence[int], mix: Sequence[v2.Transform] = ()) -> None:
        self.shape = shape
        self.mix = v2.RandomChoice(list(mix)) if mix else None

    def __call__(self, samples: list[tuple[Any, ...] | None]) -> tuple[Tensor, Tensor]:
        """Stacks (image, label) or (image, label, seed), without those skipped."""
        found = [sample for sample in samples if sample is not None]
        if not found:
            return torch.empty(0, *self.shape), torch.empty(0, dtype=torch.int64)
        images, labels = default_collate([sample[:2] for sample in found])
        if self.mix is not None:
            images = v2.functional.to_dtype(images, torch.float32, scale=True)
            with seeded(found[0][2] if len(found[0]) > 2 else None):
                images, labels = self.mix(images, labels)
        return images, labels

"""The base of the data modules whose images are read by index: three sets and their loaders."""

from abc import abstractmethod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from teamnet_pl.data.base import ImageDataModule, Split
from teamnet_pl.data.loading import (
    EpochSampler,
    EvaluationSampler,
    ResumableLoader,
    SeededIndex,
    SequentialEpochSampler,
    TransformedSubset,
)

Selection: TypeAlias = tuple[Dataset[Any], npt.NDArray[np.int64]]
"""A map-style dataset, and the indices of the images to use."""


class MapStyleDataModule(ImageDataModule):
    """Base of the datasets whose images are read by index, in any order.

    The training images are shuffled anew in each epoch. Under a distributed strategy, the batches
    that the processes train on at the same time hold the images of one batch of a single process
    whose batch size is the sum of theirs. In validation, test and prediction, each image is served
    once, by one process. The test split serves ``test`` and ``predict`` only.

    Args:
        **kwargs: Arguments of `ImageDataModule`.

    Attributes:
        train_set: The augmented training images, after ``setup`` for "fit" or "validate".
        val_set: The validation images, likewise.
        test_set: The test images, after ``setup`` for "test" or "predict".

    Raises:
        TeamNetError: If an argument is out of its range, or, in ``setup``, the data do not fit the
            arguments or the attributes.
    """

    train_set: TransformedSubset
    val_set: TransformedSubset
    test_set: TransformedSubset

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Any]:
        """Opens a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            A map-style dataset of (image, label), whose images are what ``v2.ToImage`` takes (PIL
            image, (C, H, W) tensor or (H, W, C) array).
        """

    def train_and_val(self) -> tuple[Selection, Selection]:
        """Selects the training and the validation images; here all of both splits."""
        return _whole(self.dataset("train")), _whole(self.dataset("val"))

    def val_source(self) -> str:
        """Returns where the validation images come from, for the log."""
        return "the dataset's own validation split"

    def setup(self, stage: str) -> None:
        """Opens the splits that the stage needs (Lightning's hook)."""
        super().setup(stage)
        if stage in ("fit", "validate"):
            train, val = self.train_and_val()
            self.train_set = self._subset(train, self._train_pipeline(), "train_transform")
            self.val_set = self._subset(val, self._eval_pipeline(), "the evaluation transform")
            rank_zero_info(
                f"{type(self).__name__}: {len(self.val_set):,} images for validation, from "
                f"{self.val_source()}; {len(self.train_set):,} for training."
            )
        else:
            test = _whole(self.dataset("test"))
            self.test_set = self._subset(test, self._eval_pipeline(), "the evaluation transform")

    def training_dataset(self, stage: str) -> Dataset[Any]:
        """Returns the training split, which ``setup`` opens for some stages only.

        Args:
            stage: The stage that ``setup`` has finished.
        """
        return self.train_set.dataset if stage in ("fit", "validate") else self.dataset("train")

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of shuffled, augmented training batches."""
        sampler = self._train_sampler()
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            sampler = SequentialEpochSampler(self.train_set, self._seed, *self._processes())
        loader: DataLoader[Any] = ResumableLoader(
            self.train_set,
            sampler=sampler,
            # Batch norm cannot train on a last batch of one image.
            drop_last=len(sampler) > self.batch_size,
            **self._loader_options(self._mixes()),
        )
        self._check_validation_interval(len(loader))
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of validation batches, in a fixed order."""
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of test batches, in the order of the dataset."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of test batches in which an unreadable image is an error."""
        test = self.test_set
        strict = TransformedSubset(test.dataset, test.indices, test.transform)
        return self._evaluation_loader(strict, even=False)

    def _subset(
        self, selection: Selection, transform: v2.Transform, transform_name: str
    ) -> TransformedSubset:
        subset = TransformedSubset(*selection, transform, self.skipped)
        sample = subset[SeededIndex(0, seed=0)]
        assert sample is not None  # a seeded index always gives a sample
        self._check_shape(sample[0], transform_name)
        return subset

    def _train_sampler(self) -> EpochSampler:
        return EpochSampler(self.train_set, self._seed, *self._processes())

    def _evaluation_loader(self, images: TransformedSubset, even: bool = True) -> DataLoader[Any]:
        """Makes the loader of this process's share, which `EvaluationSampler` describes."""
        sampler = EvaluationSampler(images, *self._processes(), even)
        return DataLoader(images, sampler=sampler, **self._loader_options())


def _whole(dataset: Dataset[Any]) -> Selection:
    return dataset, np.arange(len(dataset))  # type: ignore[arg-type]

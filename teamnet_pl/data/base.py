"""The base of the data modules: splits, transforms and loaders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from sklearn.model_selection import train_test_split
from sklearn.utils import resample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from teamnet_pl.data.loading import (
    Collate,
    Draw,
    EpochSampler,
    EvaluationSampler,
    ResumableLoader,
    SameOrderSampler,
    Skipped,
    TransformedSubset,
)
from teamnet_pl.data.preprocessing import PreprocessingConfig, describe_transform
from teamnet_pl.errors import TeamNetError

Split = Literal["train", "val", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image classification datasets.

    A subclass sets the four attributes below, defines :meth:`load_split`, and may override
    :meth:`default_train_transform`, :meth:`eval_transform` and Lightning's ``prepare_data``::

        class CIFAR10(ImageDataModule):
            num_classes, input_shape = 10, (3, 32, 32)
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

            def prepare_data(self):
                datasets.CIFAR10("data", download=True)

            def load_split(self, split):
                dataset = datasets.CIFAR10("data", train=split == "train")
                return dataset, dataset.targets

    The validation set is cut from the training split, unless the dataset has one of its own, and
    read with the evaluation transform; the test split serves ``test`` and ``predict`` only.

    A loader's batches are (images, labels): images as stored, (N, C, H, W) and mostly uint8, so
    that little is copied from process to process and to the GPU; and int64 (N,). There
    :meth:`normalize` makes float32 of them; Lightning's trainer does so by itself. With MixUp or
    CutMix on, training images are float32 in [0, 1] and their labels float32 (N, num_classes)
    probabilities.

    After ``seed_everything(seed)`` a run sees the same batches again, also if it was stopped within
    an epoch and goes on from a checkpoint. Each image's place and augmentation depend on the seed,
    the epoch and the image alone, not on ``num_workers`` or what else draws random numbers. Under a
    distributed strategy, one batch of each process together hold the images of one batch of a
    single process with the batch size of all of them; MixUp and CutMix mix those of each process.
    In validation, test and prediction each image is served once, by one process.
    That holds for transforms that draw from torch, as all of torchvision's do, from NumPy's or from
    Python's global generator.

    Args:
        batch_size: Images per batch, on each device.
        val_fraction: Share of the training split held out for validation, stratified by label.
            ``None`` for the dataset's own validation split, or 0.1 where it has none.
        train_size: Train on a stratified subset of this many images; ``None`` for all of them.
            The validation set stays the same.
        split_seed: Seed of the validation split and of the subset.
        num_workers: Loader processes of each loader; 0 loads in the main process. ``None`` for 0 if
            the CPU trains, which has no core to spare, and else one less than there are cores for
            each GPU, at most 8.
        train_transform: Augmentation of the training images, a torchvision v2 transform or a list
            of them: ``None`` for the dataset's standard recipe, ``[]`` for none. It gets one image
            of shape (C, H, W), as stored (integers in their full range or floats in [0, 1]);
            conversion to float and normalisation follow it.
        extra_transform: Further augmentation after that, such as RandAugment or random erasing.
        mixup_alpha: Parameter of MixUp's Beta distribution (Zhang et al. 2018,
            arXiv:1710.09412); 0 turns it off.
        cutmix_alpha: Parameter of CutMix's Beta distribution (Yun et al. 2019,
            arXiv:1905.04899); 0 turns it off. With MixUp also on, each batch gets one of the two,
            at even odds.

    Attributes:
        num_classes: Number of classes; labels are 0 .. num_classes - 1.
        input_shape: (channels, height, width) of the images.
        mean: Mean of each channel over the training split, for pixels in [0, 1].
        std: Standard deviation, likewise.
        has_val: Whether the dataset has a validation split of its own.
        classes: Names of the classes, in the order of the labels, at the latest after ``setup``;
            None if they have only numbers.

    Raises:
        ValueError: An argument is out of its range; in ``setup``, the data don't fit the arguments
            or the attributes.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    has_val = False
    classes: Sequence[str] | None = None
    bits = 16
    skipped: Skipped | None = None  # where images that can't be read are noted

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val_fraction: float | None = None,
        train_size: int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        train_transform: v2.Transform | list[v2.Transform] | None = None,
        extra_transform: v2.Transform | list[v2.Transform] = [],  # noqa: B006 (never changed)
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise TeamNetError(f"batch_size must be at least 1, got {batch_size}.")
        if val_fraction is not None:
            check_fraction("val_fraction", val_fraction)
        if train_size is not None and train_size < 1:
            raise TeamNetError(
                f"train_size must be at least 1, got {train_size}. For all images, leave it out."
            )
        if not 0 <= split_seed < 2**32:
            raise TeamNetError(f"split_seed must be in [0, 2**32), got {split_seed}.")
        if num_workers is not None and num_workers < 0:
            raise TeamNetError(f"num_workers must be 0 or more, got {num_workers}.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise TeamNetError(f"{name} must be 0 (off) or positive, got {alpha}.")
        self.batch_size = batch_size
        self._given_batch_size = batch_size  # which BatchSizeFinder may change
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.extra_transform = extra_transform
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha

    @abstractmethod
    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.ArrayLike]:
        """Load one split.

        Args:
            split: Which; "val" only if ``has_val``.

        Returns:
            A map-style dataset of (image, label), its images being whatever ``v2.ToImage`` takes
            (PIL image, (C, H, W) tensor, (H, W, C) array), and all its labels, in the same order.
        """

    def default_train_transform(self) -> list[v2.Transform]:
        """The dataset's standard augmentation, for ``train_transform=None``; here none."""
        return []

    def eval_transform(self) -> list[v2.Transform]:
        """What brings a validation or test image to ``input_shape``; here nothing."""
        return []

    def describe(self) -> dict[str, Any]:
        """Describe, as plain values, how images reach a net and what its outputs stand for.

        Returns:
            ``preprocessing``: the fields of :class:`PreprocessingConfig`; ``classes``: the names of
            the classes, in the order of the labels.
        """
        try:
            transform = [describe_transform(transform) for transform in self.eval_transform()]
        except ValueError as error:
            transform = None
            rank_zero_warn(
                f"Checkpoints will lack the evaluation transform, which prediction needs: {error}"
            )
        preprocessing = PreprocessingConfig(
            input_shape=list(self.input_shape),
            mean=[float(value) for value in self.mean],
            std=[float(value) for value in self.std],
            transform=transform,
            bits=self.bits,
        )
        return {
            "preprocessing": asdict(preprocessing),
            "classes": [str(name) for name in self.classes or range(self.num_classes)],
        }

    def val_source(self) -> str:
        """Where the validation images come from, in words."""
        if self.has_val and self.val_fraction is None:
            return "the dataset's own validation split"
        return f"a share of {self.val_fraction or 0.1:g} of the training split"

    def setup(self, stage: str) -> None:
        """Load and split what the stage needs (Lightning's hook)."""
        self.draw_seed()
        evaluation = v2.Compose([v2.ToImage(), *self.eval_transform()])
        if stage in ("fit", "validate"):
            (train_data, train), (val_data, val) = self._train_and_val()
            rank_zero_info(
                f"{type(self).__name__}: {len(val):,} images for validation, from "
                f"{self.val_source()}; {len(train):,} for training."
            )
            self.train_set = self._served(train_data, train, self._augmentation())
            self.val_set = self._served(val_data, val, evaluation)
            self._check_shape(self.val_set, "the evaluation transform")
            self._check_shape(self.train_set, "train_transform")
        else:
            dataset, labels = self._load_checked("test")
            self.test_set = self._served(dataset, np.arange(len(labels)), evaluation)
            self._check_shape(self.test_set, "the evaluation transform")

    def draw_seed(self) -> None:
        """Draws what order and augmentation depend on from the run's seed."""
        seed = torch.initial_seed()
        if self.trainer:  # each process has its own, unless the user seeded all alike
            seed = self.trainer.strategy.broadcast(seed)
        # Neighbours would share epochs: the sampler adds the epoch to its seed.
        self._seed = int(np.random.default_rng(seed).integers(2**31))

    def state_dict(self) -> dict[str, Any]:
        """The seed and the batch size, so that a resumed run goes on with the same batches."""
        return {"seed": self._seed, "batch_size": [self._given_batch_size, self.batch_size]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with a checkpoint's seed, and with a batch size that was searched for."""
        seed = state_dict["seed"]
        given, searched = state_dict.get("batch_size", [None, self.batch_size])
        if not type(seed) is type(searched) is int or searched < 1:
            raise TeamNetError(
                "The checkpoint's state of the data must have a whole number as seed and as "
                f"batch_size, found {seed!r} and {searched!r}."
            )
        self._seed = seed
        if self.batch_size == given:  # else the user wants another
            self.batch_size = searched

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented training batches."""
        sampler = self._sampler()
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            sampler = SameOrderSampler(self.train_set, self._seed, *self._processes())
        return ResumableLoader(
            self.train_set,
            sampler=sampler,
            # Batch norm can't train on a last batch of one image.
            drop_last=len(sampler) > self.batch_size,
            **self._loader_options(self._mixes()),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, in a fixed order."""
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in the dataset's order."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches."""
        return self._evaluation_loader(self.test_set, even=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Makes what a net takes of a loader's images.

        Args:
            images: (N, C, H, W), integers in their full range or floats in [0, 1].

        Returns:
            float32 (N, C, H, W), with the mean taken off and divided by the standard deviation.
        """
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
        images = v2.functional.normalize(images, list(self.mean), list(self.std))
        return images

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Normalizes a batch where the net is (Lightning's hook)."""
        images, labels = batch
        images = self.normalize(images)
        if self.trainer:  # which has already converted what were floats before
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def _load_checked(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        dataset, array = self.load_split(split)
        labels = np.asarray(array, dtype=np.int64)
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        where = f"{type(self).__name__}, {name} split"
        if (images := len(dataset)) != len(labels):  # type: ignore[arg-type]
            raise TeamNetError(f"{where}: {images} images but {len(labels)} labels.")
        if not images:
            raise TeamNetError(f"{where}: there is no image in it.")
        wrong = np.unique(labels[(labels < 0) | (labels >= self.num_classes)])
        if len(wrong):
            raise TeamNetError(
                f"{where}: labels must be in 0..{self.num_classes - 1}, found {wrong.tolist()}. "
                "The label file is damaged or belongs to another dataset."
            )
        return dataset, labels

    def _train_and_val(self) -> tuple[tuple[Dataset[Any], npt.NDArray[np.int64]], ...]:
        """Dataset and indices of the training and of the validation set."""
        dataset, labels = self._load_checked("train")
        if self.has_val and self.val_fraction is None:
            train = np.arange(len(labels))
            val_data, val_labels = self._load_checked("val")
            val = np.arange(len(val_labels))
        else:
            val_data, fraction = dataset, self.val_fraction or 0.1
            train, val = stratified_split(labels, "val_fraction", fraction, self.split_seed)
        if self.train_size is not None:
            train = self._subset(train, labels[train], self.train_size)
        return (dataset, train), (val_data, val)

    def _subset(
        self, indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], size: int
    ) -> npt.NDArray[np.int64]:
        if not (classes := len(np.unique(labels))) <= size <= len(indices):
            raise TeamNetError(
                f"train_size must be between {classes} (one image a class) and {len(indices)} (the "
                f"training split less the validation set), got {size}."
            )
        chosen: npt.NDArray[np.int64] = resample(
            indices,
            replace=False,
            n_samples=size,
            stratify=labels,
            random_state=self.split_seed,
        )
        return chosen

    def _augmentation(self) -> v2.Transform:
        chosen = self.train_transform
        if chosen is None:
            chosen = self.default_train_transform()
        steps: list[v2.Transform] = [v2.ToImage()]
        for part in (chosen, self.extra_transform):
            steps += part if isinstance(part, list) else [part]
        return v2.Compose(steps)

    def _served(
        self, dataset: Dataset[Any], indices: npt.NDArray[np.int64], transform: v2.Transform
    ) -> TransformedSubset:
        return TransformedSubset(dataset, indices, transform, self.skipped)

    def _check_shape(self, subset: TransformedSubset, transform: str) -> None:
        sample = subset[Draw(0, seed=0)]
        assert sample is not None  # as it is asked for with a seed
        shape = tuple(sample[0].shape)
        if shape != self.input_shape:
            raise TeamNetError(
                f"{type(self).__name__}: {transform} gives an image of shape {shape}, but "
                f"input_shape is {self.input_shape}. The transform has to crop or resize to it."
            )

    def _evaluation_loader(self, images: TransformedSubset, even: bool = True) -> DataLoader[Any]:
        """Loads this process's share, of which see `EvaluationSampler`."""
        sampler = EvaluationSampler(images, *self._processes(), even)
        return DataLoader(images, sampler=sampler, **self._loader_options())

    def _sampler(self) -> EpochSampler:
        return EpochSampler(self.train_set, self._seed, *self._processes())

    def _processes(self) -> tuple[int, int]:
        """How many there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _mixes(self) -> list[v2.Transform]:
        return [
            mix(alpha=float(alpha), num_classes=self.num_classes)  # torch fails on an int
            for mix, alpha in ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
            if alpha > 0
        ]

    def _loader_options(self, mixes: Sequence[v2.Transform] = ()) -> dict[str, Any]:
        device, workers = "cpu", self.num_workers
        if self.trainer:
            device = self.trainer.strategy.root_device.type
        if workers is None:
            workers = 0
            if self.trainer and device != "cpu":
                workers = min(8, suggested_max_num_workers(self.trainer.num_devices))
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": device == "cuda",
            "collate_fn": Collate(self.input_shape, mixes),
        }


def check_fraction(name: str, fraction: float) -> None:
    """Check that a share of a dataset leaves something on either side.

    Args:
        name: The argument's name, for the message.
        fraction: Its value.

    Raises:
        ValueError: The fraction isn't strictly between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise TeamNetError(f"{name} must be strictly between 0 and 1, got {fraction}.")


def stratified_split(
    labels: npt.NDArray[np.int64], name: str, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split a dataset in two, each class in the same proportion.

    Args:
        labels: Class of each sample, shape (N,).
        name: Name of the fraction's argument, for the message.
        fraction: Share of the samples in the second part.
        seed: The same seed gives the same split.

    Returns:
        The indices of the samples in the first and in the second part.

    Raises:
        ValueError: A class has fewer than two samples, or a part would have fewer samples than
            there are classes.
    """
    try:
        first, second = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        classes, counts = np.unique(labels, return_counts=True)
        raise TeamNetError(
            f"Can't split {len(labels)} samples of {len(classes)} classes, {counts.min()} in the "
            f"smallest, by label with {name}={fraction}: {error} Use another fraction or more "
            "samples."
        ) from error
    return first, second

"""The base of the data modules: splits, transforms and loaders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from sklearn.utils import resample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision.transforms import v2


class TransformedSubset(Dataset[tuple[Tensor, Any]]):
    """Some images of a dataset, each transformed as it is read.

    Args:
        dataset: Map-style dataset of (image, label).
        indices: Which of its samples to serve, in this order.
        transform: Applied to the image.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: npt.NDArray[np.int64],
        transform: v2.Transform,
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[int(self.indices[index])]
        return self.transform(image), label


def _collate(samples: list[Any], transform: v2.Transform) -> tuple[Tensor, Tensor]:
    images, labels = transform(*default_collate(samples))
    return images, labels


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image classification datasets.

    A subclass sets the four attributes below, defines :meth:`load_split`, and may override
    :meth:`default_train_transform`, :meth:`eval_transform` and Lightning's ``prepare_data``::

        class CIFAR10(ImageDataModule):
            num_classes, input_shape = 10, (3, 32, 32)
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

            def prepare_data(self):
                datasets.CIFAR10("data", download=True)

            def load_split(self, train):
                dataset = datasets.CIFAR10("data", train=train)
                return dataset, dataset.targets

    The validation set is cut from the training split and read with the evaluation transform; the
    test split serves ``test`` and ``predict`` only. Every batch is (images, labels): float32
    (N, C, H, W), normalised, and int64 (N,). With MixUp or CutMix on, training labels are float32
    (N, num_classes) probabilities instead.

    After ``seed_everything(seed, workers=True)`` a run sees the same batches again. The order of
    the images depends on the seed alone (under a distributed strategy, on Lightning's sampler).
    Random transforms, MixUp and CutMix draw from the random state of the process that loads: the
    main one with ``num_workers=0``, each worker's own otherwise. So what they draw changes with
    ``num_workers`` and, at 0, with what else draws random numbers, such as the network.

    Args:
        batch_size: Images per batch, on each device.
        val_fraction: Share of the training split held out for validation, stratified by label.
        train_size: Train on a stratified subset of this many images; ``None`` for all of them.
            The validation set stays the same.
        split_seed: Seed of the validation split and of the subset.
        num_workers: Loader processes. 0, loading in the main process, suits small images on few
            cores.
        train_transform: Augmentation of the training images, a torchvision v2 transform or a list
            of them: ``None`` for the dataset's standard recipe, ``[]`` for none. It gets one image
            of shape (C, H, W), as stored (integers in their full range or floats in [0, 1]);
            conversion to float and normalisation follow it.
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

    Raises:
        ValueError: An argument is out of its range; in ``setup``, the data don't fit the arguments
            or the attributes.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        train_transform: v2.Transform | list[v2.Transform] | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        check_fraction("val_fraction", val_fraction)
        if train_size is not None and train_size < 1:
            raise ValueError(
                f"train_size must be at least 1, got {train_size}. For all images, leave it out."
            )
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"split_seed must be in [0, 2**32), got {split_seed}.")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} must be 0 (off) or positive, got {alpha}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        # Of its own, so that neither the model nor num_workers changes the order.
        self._shuffle = torch.Generator()

    @abstractmethod
    def load_split(self, train: bool) -> tuple[Dataset[Any], npt.ArrayLike]:
        """Load the training or the test split.

        Args:
            train: Whether to load the training split.

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

    def setup(self, stage: str) -> None:
        """Load and split what the stage needs (Lightning's hook)."""
        evaluation = v2.Compose([v2.ToImage(), *self.eval_transform()])
        if stage in ("fit", "validate"):
            dataset, labels = self._load_checked(train=True)
            train, val = self._split(labels)
            self.train_set = TransformedSubset(dataset, train, self._augmentation())
            self.val_set = TransformedSubset(dataset, val, evaluation)
            self._check_shape(self.val_set, "the evaluation transform")
            self._check_shape(self.train_set, "train_transform")
            # Here, so that Lightning's reloading of the loaders doesn't start the order anew.
            self._shuffle.manual_seed(torch.initial_seed())
        else:
            dataset, labels = self._load_checked(train=False)
            self.test_set = TransformedSubset(dataset, np.arange(len(labels)), evaluation)
            self._check_shape(self.test_set, "the evaluation transform")

    def state_dict(self) -> dict[str, Any]:
        """The state of the shuffling, so that a resumed run goes on with the same order."""
        return {"shuffle": self._shuffle.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint's shuffling."""
        self._shuffle.set_state(state_dict["shuffle"].cpu())

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented training batches."""
        mixes = [
            mix(alpha=float(alpha), num_classes=self.num_classes)  # torch fails on an int
            for mix, alpha in ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
            if alpha > 0
        ]
        devices = self.trainer.world_size if self.trainer else 1
        return self._dataloader(
            self.train_set,
            [v2.RandomChoice(mixes)] if mixes else [],
            sampler=RandomSampler(self.train_set, generator=self._shuffle),
            # Batch norm can't train on a last batch of one image.
            drop_last=len(self.train_set) // devices > self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, in a fixed order."""
        return self._dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in the dataset's order."""
        return self._dataloader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches."""
        return self.test_dataloader()

    def _load_checked(self, train: bool) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        dataset, array = self.load_split(train)
        labels = np.asarray(array, dtype=np.int64)
        where = f"{type(self).__name__}, {'training' if train else 'test'} split"
        if (images := len(dataset)) != len(labels):  # type: ignore[arg-type]
            raise ValueError(f"{where}: {images} images but {len(labels)} labels.")
        wrong = np.unique(labels[(labels < 0) | (labels >= self.num_classes)])
        if len(wrong):
            raise ValueError(
                f"{where}: labels must be in 0..{self.num_classes - 1}, found {wrong.tolist()}. "
                "The label file is damaged or belongs to another dataset."
            )
        return dataset, labels

    def _split(
        self, labels: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        train, val = stratified_split(labels, "val_fraction", self.val_fraction, self.split_seed)
        if self.train_size is None:
            return train, val
        if not (classes := len(np.unique(labels))) <= self.train_size <= len(train):
            raise ValueError(
                f"train_size must be between {classes} (one image a class) and {len(train)} (the "
                f"training split less the validation set), got {self.train_size}."
            )
        subset = resample(
            train,
            replace=False,
            n_samples=self.train_size,
            stratify=labels[train],
            random_state=self.split_seed,
        )
        return subset, val

    def _augmentation(self) -> v2.Transform:
        chosen = self.train_transform
        if chosen is None:
            chosen = self.default_train_transform()
        return v2.Compose([v2.ToImage(), *(chosen if isinstance(chosen, list) else [chosen])])

    def _check_shape(self, subset: TransformedSubset, transform: str) -> None:
        with torch.random.fork_rng(devices=[]):
            shape = tuple(subset[0][0].shape)
        if shape != self.input_shape:
            raise ValueError(
                f"{type(self).__name__}: {transform} gives an image of shape {shape}, but "
                f"input_shape is {self.input_shape}. The transform has to crop or resize to it."
            )

    def _dataloader(
        self,
        dataset: TransformedSubset,
        mix: Sequence[v2.Transform] = (),
        **kwargs: Any,
    ) -> DataLoader[Any]:
        # Once a batch: the same, image by image, costs as much as the augmentation.
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std), *mix]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_collate, transform=v2.Compose(finish)),
            **kwargs,
        )


def check_fraction(name: str, fraction: float) -> None:
    """Check that a share of a dataset leaves something on either side.

    Args:
        name: The argument's name, for the message.
        fraction: Its value.

    Raises:
        ValueError: The fraction isn't strictly between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be strictly between 0 and 1, got {fraction}.")


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
        raise ValueError(
            f"Can't split {len(labels)} samples of {len(classes)} classes, {counts.min()} in the "
            f"smallest, by label with {name}={fraction}: {error} Use another fraction or more "
            "samples."
        ) from error
    return first, second

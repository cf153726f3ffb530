"""The base of the data modules whose labels are known in advance: stratified splits."""

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from teamnet_pl.data.base import Split
from teamnet_pl.data.map_style import MapStyleDataModule, Selection
from teamnet_pl.errors import TeamNetError

_DEFAULT_VAL_FRACTION = 0.1


class SplitDataModule(MapStyleDataModule):
    """Base of the datasets that are loaded split by split, with all labels of a split.

    A subclass sets the attributes of `ImageDataModule`, defines `load_split`, and may override
    `default_train_transform`, `eval_transform` and Lightning's ``prepare_data``::

        class CIFAR10(SplitDataModule):
            num_classes, input_shape = 10, (3, 32, 32)
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

            def prepare_data(self):
                datasets.CIFAR10("data", download=True)

            def load_split(self, split):
                dataset = datasets.CIFAR10("data", train=split == "train")
                return dataset, dataset.targets

    The validation set is taken from the training split, unless the dataset has a validation split,
    and read with the evaluation transform.

    Args:
        val_fraction: Share of the training split held out for validation, stratified by label.
            ``None`` for the validation split of the dataset, or 0.1 if it has none.
        train_size: Number of training images to use, as a stratified subset; ``None`` for all of
            them. The validation set does not depend on it.
        split_seed: Seed of the validation split and of the subset.
        **kwargs: Arguments of `ImageDataModule`.

    Attributes:
        has_val: Whether the dataset has a validation split.

    Raises:
        TeamNetError: If an argument is out of its range, or, in ``setup``, the data do not fit the
            arguments or the attributes.
    """

    has_val = False

    def __init__(
        self,
        *,
        val_fraction: float | None = None,
        train_size: int | None = None,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if val_fraction is not None:
            check_fraction("val_fraction", val_fraction)
        if train_size is not None and train_size < 1:
            raise TeamNetError(
                f"train_size must be at least 1, found {train_size}. For all images, leave it out."
            )
        if not 0 <= split_seed < 2**32:
            raise TeamNetError(f"split_seed must be in [0, 2**32), found {split_seed}.")
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.split_seed = split_seed

    @abstractmethod
    def load_split(self, split: Split) -> tuple[Dataset[Any], npt.ArrayLike]:
        """Loads a split.

        Args:
            split: "train", "test", or, if ``has_val``, "val".

        Returns:
            A map-style dataset of (image, label), whose images are what ``v2.ToImage`` takes (PIL
            image, (C, H, W) tensor or (H, W, C) array), and all its labels, in the same order.
        """

    def dataset(self, split: Split) -> Dataset[Any]:
        """Loads a split and checks its labels; see `load_split`."""
        return self._load_checked(split)[0]

    def train_and_val(self) -> tuple[Selection, Selection]:
        """Selects the training and the validation images."""
        dataset, labels = self._load_checked("train")
        if self.has_val and self.val_fraction is None:
            train = np.arange(len(labels))
            val_dataset, val_labels = self._load_checked("val")
            val = np.arange(len(val_labels))
        else:
            val_dataset, fraction = dataset, self.val_fraction or _DEFAULT_VAL_FRACTION
            train, val = stratified_split(labels, "val_fraction", fraction, self.split_seed)
        if self.train_size is not None:
            train = self._stratified_subset(train, labels[train], self.train_size)
        return (dataset, train), (val_dataset, val)

    def val_source(self) -> str:
        """Returns where the validation images come from, for the log."""
        if self.has_val and self.val_fraction is None:
            return super().val_source()
        return f"a share of {self.val_fraction or _DEFAULT_VAL_FRACTION:g} of the training split"

    def _load_checked(self, split: Split) -> tuple[Dataset[Any], npt.NDArray[np.int64]]:
        dataset, label_array = self.load_split(split)
        labels = np.asarray(label_array, dtype=np.int64)
        split_name = {"train": "training", "val": "validation", "test": "test"}[split]
        where = f"{type(self).__name__}, {split_name} split"
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

    def _stratified_subset(
        self, indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], size: int
    ) -> npt.NDArray[np.int64]:
        from sklearn.utils import resample

        if not (classes := len(np.unique(labels))) <= size <= len(indices):
            raise TeamNetError(
                f"train_size must be between {classes} (one image per class) and {len(indices)} "
                f"(the training split without the validation set), found {size}."
            )
        subset: npt.NDArray[np.int64] = resample(
            indices,
            replace=False,
            n_samples=size,
            stratify=labels,
            random_state=self.split_seed,
        )
        return subset


def check_fraction(name: str, fraction: float) -> None:
    """Refuses a share of a dataset that leaves nothing on one side.

    Args:
        name: Name of the argument, for the message.
        fraction: The share.

    Raises:
        TeamNetError: If the share is not strictly between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise TeamNetError(f"{name} must be strictly between 0 and 1, found {fraction}.")


def stratified_split(
    labels: npt.NDArray[np.int64], name: str, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Splits a dataset in two, with the same proportion of each class.

    Args:
        labels: Class of each sample, shape (N,).
        name: Name of the argument that holds the fraction, for the message.
        fraction: Share of the samples in the second part.
        seed: The same seed gives the same split.

    Returns:
        The indices of the samples in the first and in the second part.

    Raises:
        TeamNetError: If a class has fewer than two samples, or a part would have fewer samples than
            there are classes.
    """
    from sklearn.model_selection import train_test_split

    try:
        first, second = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        classes, counts = np.unique(labels, return_counts=True)
        raise TeamNetError(
            f"{len(labels)} samples of {len(classes)} classes, {counts.min()} in the smallest, "
            f"cannot be split by label with {name}={fraction}: {error} Use another fraction or "
            "more samples."
        ) from error
    return first, second

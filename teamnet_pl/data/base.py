"""The base of all data modules: transforms, normalization, seeds and loader options."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms import v2

from teamnet_pl.data.loading import Collate, SkippedImages
from teamnet_pl.data.preprocessing import PreprocessingConfig, describe_transform
from teamnet_pl.errors import TeamNetError

Split = Literal["train", "val", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Base of all image classification datasets, however their images are stored.

    A new dataset usually subclasses `SplitDataModule`, which needs a single method. A dataset that
    is only a stream subclasses this class: it sets the attributes below, and defines Lightning's
    ``setup`` and loaders.

    The batches of a loader are (images, labels): images as stored, (N, C, H, W) and mostly uint8,
    so that little is copied between processes and to the GPU, and int64 labels (N,). `normalize`
    then turns the images into float32 on the device; Lightning's trainer calls it by itself. With
    MixUp or CutMix, training images are float32 in [0, 1] and their labels are float32
    (N, num_classes) probabilities.

    After ``seed_everything(seed)``, a run sees the same batches again, even if it was stopped
    within an epoch and resumed from a checkpoint. The position and the augmentation of each image
    depend on the seed, the epoch and the image alone, not on ``num_workers`` or on other code that
    draws random numbers. This holds for transforms that draw from torch, as all of torchvision's
    do, or from the global generators of NumPy or Python. Under a distributed strategy, MixUp and
    CutMix mix the images of each process separately.

    Args:
        batch_size: Images per batch, on each device.
        num_workers: Worker processes of each loader; 0 loads in the main process. ``None`` selects
            0 for training on the CPU, which has no core to spare, and otherwise one less than the
            number of cores per GPU, at most 8.
        train_transform: Augmentation of the training images, a torchvision v2 transform or a list
            of them: ``None`` for the standard recipe of the dataset, ``[]`` for none. Its input is
            one image of shape (C, H, W) as stored (integers in their full range or floats in
            [0, 1]); conversion to float and normalization follow it.
        extra_transform: Further augmentation after that, such as RandAugment or random erasing.
        mixup_alpha: Parameter of the Beta distribution of MixUp (Zhang et al. 2018,
            arXiv:1710.09412); 0 turns it off.
        cutmix_alpha: Parameter of the Beta distribution of CutMix (Yun et al. 2019,
            arXiv:1905.04899); 0 turns it off. If MixUp is on as well, each batch gets one of the
            two with equal probability.

    Attributes:
        num_classes: Number of classes; labels are 0 .. num_classes - 1.
        input_shape: (channels, height, width) of the images.
        mean: Mean of each channel over the training split, for pixels in [0, 1].
        std: Standard deviation of each channel over the training split, for pixels in [0, 1].
        classes: Names of the classes in the order of the labels, set by the end of ``setup``;
            None if classes only have numbers.
        bits: Number of bits that hold values in images with 16 bits.
        skipped: Record of the unreadable images that were skipped; None if they are errors.

    Raises:
        TeamNetError: If an argument is out of its range, or, in ``setup``, the data do not fit the
            arguments or the attributes.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    bits = 16
    skipped: SkippedImages | None = None

    def __init__(
        self,
        *,
        batch_size: int = 128,
        num_workers: int | None = None,
        train_transform: v2.Transform | list[v2.Transform] | None = None,
        extra_transform: v2.Transform | list[v2.Transform] = [],  # noqa: B006 (never changed)
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise TeamNetError(f"batch_size must be at least 1, found {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise TeamNetError(f"num_workers must be 0 or more, found {num_workers}.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise TeamNetError(f"{name} must be 0 (off) or positive, found {alpha}.")
        self.batch_size = batch_size
        self._given_batch_size = batch_size  # BatchSizeFinder may change the other
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.extra_transform = extra_transform
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha

    def default_train_transform(self) -> list[v2.Transform]:
        """Returns the standard augmentation, used for ``train_transform=None``; here none."""
        return []

    def eval_transform(self) -> list[v2.Transform]:
        """Returns the transforms that bring an evaluation image to ``input_shape``; here none."""
        return []

    def describe(self) -> dict[str, Any]:
        """Describes the input of a net and the meaning of its outputs as plain values.

        Returns:
            ``preprocessing``: the fields of `PreprocessingConfig`; ``classes``: the names of the
            classes, in the order of the labels.
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

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Draws the seed of order and augmentation; a subclass loads its images besides.

        Args:
            stage: Given by Lightning: "fit", "validate", "test" or "predict".
        """
        seed = torch.initial_seed()
        if self.trainer:  # processes have different seeds unless the user seeded all alike
            seed = self.trainer.strategy.broadcast(seed)
        # Neighboring seeds would share epochs: the sampler adds the epoch to its seed.
        self._seed = int(np.random.default_rng(seed).integers(2**31))

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed and the batch size, so that a resumed run sees the same batches."""
        return {"seed": self._seed, "batch_size": [self._given_batch_size, self.batch_size]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the seed, and a batch size that was searched for, from a checkpoint."""
        seed = state_dict["seed"]
        given, searched = state_dict.get("batch_size", [None, self.batch_size])
        if not type(seed) is type(searched) is int or searched < 1:
            raise TeamNetError(
                "The checkpoint's state of the data must have a whole number as seed and as "
                f"batch_size, found {seed!r} and {searched!r}."
            )
        self._seed = seed
        if self.batch_size == given:  # otherwise the user has asked for another one
            self.batch_size = searched

    def normalize(self, images: Tensor) -> Tensor:
        """Turns the images of a loader into the input of a net.

        Args:
            images: (N, C, H, W), integers in their full range or floats in [0, 1].

        Returns:
            float32 (N, C, H, W), with the mean subtracted and divided by the standard deviation.
        """
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
        images = v2.functional.normalize(images, list(self.mean), list(self.std))
        return images

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Normalizes a batch on the device of the net (Lightning's hook)."""
        images, labels = batch
        images = self.normalize(images)
        if self.trainer:  # it converts only tensors that were floats before
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def _train_pipeline(self) -> v2.Transform:
        """Composes the transforms of a training image."""
        chosen = self.train_transform
        if chosen is None:
            chosen = self.default_train_transform()
        steps: list[v2.Transform] = [v2.ToImage()]
        for part in (chosen, self.extra_transform):
            steps += part if isinstance(part, list) else [part]
        return v2.Compose(steps)

    def _eval_pipeline(self) -> v2.Transform:
        """Composes the transforms of a validation or test image."""
        return v2.Compose([v2.ToImage(), *self.eval_transform()])

    def _check_shape(self, image: Tensor, transform: str) -> None:
        """Refuses a transform whose images do not have ``input_shape``."""
        shape = tuple(image.shape)
        if shape != self.input_shape:
            raise TeamNetError(
                f"{type(self).__name__}: {transform} gives an image of shape {shape}, but "
                f"input_shape is {self.input_shape}. The transform has to crop or resize to it."
            )

    def _processes(self) -> tuple[int, int]:
        """Returns the number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _check_validation_interval(self, batches: int) -> None:
        """Refuses validation after more batches than an epoch has, before Lightning sets it up.

        Args:
            batches: Number of training batches of this process in an epoch.
        """
        trainer = self.trainer
        if (
            trainer is None
            or trainer.check_val_every_n_epoch is None
            or not trainer.limit_val_batches
        ):
            return
        limit, interval = trainer.limit_train_batches, trainer.val_check_interval
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if isinstance(interval, int) and interval > batches:
            raise TeamNetError(
                f"val_check_interval is {interval} batches, but an epoch has {batches}: give "
                "fewer, or count over epochs (check_val_every_n_epoch: null)."
            )

    def _mixes(self) -> list[v2.Transform]:
        """Makes the transforms that mix the images of a training batch."""
        return [
            mix(alpha=float(alpha), num_classes=self.num_classes)  # torch fails on an int
            for mix, alpha in ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
            if alpha > 0
        ]

    def _loader_options(self, mixes: Sequence[v2.Transform] = ()) -> dict[str, Any]:
        """Returns the arguments of each ``DataLoader`` besides the dataset and the sampler."""
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

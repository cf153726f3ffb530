"""What Lightning leaves out when it goes on with a training from a checkpoint."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)


def drop_finders(trainer: Trainer) -> None:
    """Takes the callbacks away that search before a training, which was done in its first part.

    They would also make Lightning forget the checkpoint, of which only the weights were restored.

    Args:
        trainer: What a checkpoint is restored into.
    """
    finders = (BatchSizeFinder, LearningRateFinder)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [  # type: ignore[attr-defined]
        callback for callback in callbacks if not isinstance(callback, finders)
    ]


def resume_epoch(trainer: Trainer, module: LightningModule) -> None:
    """Sets callbacks up that do so when an epoch starts, if the training goes on within one.

    Lightning calls no ``on_train_epoch_start`` then. Nothing that was restored is changed.

    Args:
        trainer: What a checkpoint was restored into, at the start of its training.
        module: What it trains.
    """
    loop = trainer.fit_loop
    if not (loop.restarted_mid_epoch or loop.restarted_on_epoch_end):
        return
    state = {name: value.clone() for name, value in module.state_dict().items()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (GradientAccumulationScheduler, StochasticWeightAveraging)):
            callback.on_train_epoch_start(trainer, module)
    module.load_state_dict(state)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate

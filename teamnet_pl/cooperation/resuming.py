"""Steps that Lightning leaves out when it resumes a training from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch.optim import Optimizer

from teamnet_pl.errors import TeamNetError

_TEAM = ("num_classes", "input_shape", "leader", "a", "b", "extra_teammates")
_CHANGEABLE = ("grad_checkpointing",)  # which changes no result


def check_resumable(checkpoint: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses to resume from a checkpoint of another team, or of weights alone.

    Args:
        checkpoint: The checkpoint.
        values: The hyper-parameters of the team that resumes.

    Raises:
        TeamNetError: If it cannot.
    """
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise TeamNetError(
            "The checkpoint holds weights alone, without the state of the optimizer, and cannot be "
            "resumed: resume another one, or start a new training from its weights "
            "(--model.a.checkpoint FILE and so on)."
        )
    saved = checkpoint.get("hyper_parameters") or {}
    for name in _TEAM:
        _check_same(name, saved.get(name), values[name])
    _check_same("optimizer.name", _name(saved), _name(values))


def _name(values: Mapping[str, Any]) -> str:
    return str((values.get("optimizer") or {}).get("name")).lower()


def _check_same(name: str, saved: Any, value: Any) -> None:
    if isinstance(saved, Mapping) and isinstance(value, Mapping):
        for key in {**saved, **value}:
            if key not in _CHANGEABLE:
                _check_same(f"{name}.{key}", saved.get(key), value.get(key))
    elif _plain(saved) != _plain(value):
        raise TeamNetError(
            f"The checkpoint is of a training with another {name}: {saved} there, {value} here. "
            "Resume with the same, or start a new training from its weights "
            "(--model.a.checkpoint FILE and so on)."
        )


def _plain(value: Any) -> Any:
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def apply_options(checkpoint: Mapping[str, Any], fresh: Optimizer) -> None:
    """Replaces the options of the optimizer in a checkpoint.

    Args:
        checkpoint: The checkpoint; the options of its optimizer are replaced.
        fresh: The optimizer with the new options.

    Raises:
        TeamNetError: If the two do not have the same groups of parameters.
    """
    (state,) = checkpoint["optimizer_states"]
    saved = state["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, fresh.param_groups)]
    if sizes[0] != sizes[1]:
        raise TeamNetError(
            f"The optimizer of the checkpoint has groups of {sizes[0]} parameters, and with these "
            f"options of {sizes[1]}: resume with the weight_decay of the checkpoint."
        )
    for group, options in zip(saved, fresh.param_groups, strict=True):
        # The schedule derives the learning rate of the next step from this one.
        group |= {key: value for key, value in options.items() if key not in ("params", "lr")}
        group["initial_lr"] = options["lr"]


def drop_finders(trainer: Trainer) -> None:
    """Removes the callbacks that search before a training, as its first part has done so.

    They would also make Lightning forget the checkpoint, with only the weights restored.

    Args:
        trainer: The trainer that a checkpoint is restored into.
    """
    finders = (BatchSizeFinder, LearningRateFinder)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [  # type: ignore[attr-defined]
        callback for callback in callbacks if not isinstance(callback, finders)
    ]


def resume_epoch(trainer: Trainer, module: LightningModule) -> None:
    """Sets up callbacks that do so at the start of an epoch, if the training resumes within one.

    Lightning does not call ``on_train_epoch_start`` then. The restored state is not changed.

    Args:
        trainer: The trainer that a checkpoint was restored into, at the start of its training.
        module: The module that it trains.
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


def unlogged_row(trainer: Trainer) -> dict[str, Any] | None:
    """Returns the row of the log that is still to be written when a checkpoint is saved.

    Lightning logs the metrics of a batch after the callbacks' ``on_train_batch_end``. A run that
    resumes from a checkpoint saved there would leave them out.

    Args:
        trainer: The trainer that saves a checkpoint.

    Returns:
        The row, for `log_row`; None if the log is complete.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    connector = trainer._logger_connector
    processed: int = progress.processed  # type: ignore[attr-defined]
    within_hook = trainer.training and processed > progress.completed
    if not within_hook or trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return {"step": step, "metrics": metrics | {"epoch": trainer.current_epoch}}


def log_row(trainer: Trainer, row: object) -> None:
    """Logs the row of `unlogged_row` in the run that resumes.

    Args:
        trainer: The trainer that resumes from a checkpoint.
        row: The row; None for nothing to log.
    """
    if isinstance(row, Mapping) and isinstance(row.get("metrics"), Mapping):
        for logger in trainer.loggers:
            logger.log_metrics(metrics=dict(row["metrics"]), step=row.get("step"))

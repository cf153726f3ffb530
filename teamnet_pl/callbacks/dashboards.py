"""A team on W&B, TensorBoard and MLflow: curves of all depths, tables, pictures, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from teamnet_pl.callbacks.boards import Board, Evaluation, HardImage, History, boards
from teamnet_pl.callbacks.checkpoints import LastCheckpoint
from teamnet_pl.callbacks.depth_report import team_report
from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.cooperation import Team
from teamnet_pl.cooperation.optimization import learning_rates
from teamnet_pl.cooperation.report import Report
from teamnet_pl.cooperation.team import EvaluatedSplit
from teamnet_pl.errors import TeamNetError


class Dashboards(Callback):
    """Shows a `Team` on W&B, TensorBoard and MLflow, whichever logger the run has.

    During training it logs the learning rates and the speed, and draws the accuracy of all depths
    over the epochs. After fit, validate and test it shows accuracy against cost, confusion,
    agreement between the members, and images that need depth, all from the last evaluation. It
    keeps the best and the last checkpoint with the run, if the logger's ``log_model`` is set.

    Args:
        images: Number of images for each Teammate that its deepest depth gets right and its
            shallowest does not; 0 for none.

    Raises:
        TeamNetError: If the number is negative.
    """

    def __init__(self, images: int = 8) -> None:
        if images < 0:
            raise TeamNetError(f"images must be 0 (none) or positive, found {images}.")
        self.images = images
        self._history = History()
        self._drawn = 0  # number of validations in the chart that is shown
        self._hard: dict[str, list[HardImage]] = {}
        self._since: float | None = None  # the time from which images are counted
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the accuracies so far, so that the charts of a resumed run are whole."""
        return asdict(self._history)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the accuracies of the previous run."""
        self._history = History(**state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the dashboards of the metrics.

        Raises:
            TypeError: If the module is not a team.
        """
        team = _team(pl_module)
        names = team.logged_metrics()
        depths = {
            name: [str(depth) for depth in net.depths] for name, net in team.elastic_nets.items()
        }
        for board in self._boards(trainer):
            board.define(names, depths)

    def _boards(self, trainer: Trainer) -> list[Board[Any]]:
        return boards(trainer.loggers) if trainer.is_global_zero else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to measure the speed."""
        self._since = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs the learning rates of the step."""
        if self._since is None:
            self._since, self._seen = time.perf_counter(), 0
        if trainer._logger_connector.should_update_logs:
            rates = learning_rates(trainer.optimizers[0])
            pl_module.log_dict(
                {f"train/learning_rate/{name}": rate for name, rate in rates.items()}
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the speed since it was last logged, in all processes together."""
        self._seen += len(batch[0]) * trainer.world_size
        if self._since is None or not trainer._logger_connector.should_update_logs:
            return
        now = time.perf_counter()
        pl_module.log("train/images_per_second", self._seen / (now - self._since))
        if not trainer.fit_loop._should_accumulate():
            self._since, self._seen = now, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the images of the previous validation; its time does not count."""
        self._since, self._hard = None, {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the images of the validation."""
        self._hard = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks for images that need depth."""
        self._look_for_images(trainer, _team(pl_module), outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def _look_for_images(
        self, trainer: Trainer, team: Team, probabilities: Mapping[str, Tensor], batch: Any
    ) -> None:
        if trainer.sanity_checking or not self._boards(trainer):
            return
        (images, target), classes = batch, _classes(team)
        for name, net in team.elastic_nets.items():
            kept = self._hard.setdefault(name, [])
            if len(kept) >= self.images:
                continue
            members = [f"{name}/{depth}" for depth in net.depths]
            labels = torch.stack([probabilities[member].argmax(dim=1) for member in members])
            is_hard = (labels[0] == target) & (labels[-1] != target)
            for index in is_hard.nonzero().flatten()[: self.images - len(kept)].tolist():
                predicted = [classes[label] for label in labels[:, index].tolist()]
                kept.append(
                    HardImage(
                        _pixels(images[index]),
                        classes[int(target[index])],
                        name,
                        dict(zip(map(str, net.depths), predicted, strict=True)),
                    )
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a validation that is not part of a fit, and else adds it to the curves."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer, pl_module, "val")
            return
        accuracies = {
            name: float(trainer.callback_metrics[f"val/accuracy/{name}"])
            for name in _team(pl_module).metrics_of("val").names
        }
        self._history.add(_epochs(trainer), trainer.global_step, accuracies)
        # Each drawing holds all points: ever fewer of them, or they would add up to the square.
        if len(self._history.steps) >= 1.1 * self._drawn:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, team: LightningModule) -> None:
        self._drawn = len(self._history.steps)
        for board in self._boards(trainer):
            board.show_history(self._history, _team(team).elastic_nets, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last validation, the best values and the checkpoints."""
        if not self._history.steps:
            return
        if len(self._history.steps) > self._drawn:
            self._draw(trainer, pl_module)
        report = self._show(trainer, pl_module, "val")
        for board in self._boards(trainer):
            if report is not None and board.takes_checkpoints:
                for alias, path in _checkpoints(trainer).items():
                    board.keep_checkpoint(path, alias, self._metadata(path, report))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a test."""
        self._show(trainer, pl_module, "test")

    def _show(
        self, trainer: Trainer, module: LightningModule, split: EvaluatedSplit
    ) -> Report | None:
        shown, team = self._boards(trainer), _team(module)
        if not shown or f"{split}/accuracy/mean" not in trainer.callback_metrics:
            return None
        names = team.metrics_of(split).names
        agreement, confusion = team.metrics_of(split).predictions.compute()
        report = team_report(team, trainer, split)
        evaluation = Evaluation(
            report,
            {
                name: dict(zip(names, shares, strict=True))
                for name, shares in zip(names, agreement.tolist(), strict=True)
            },
            dict(zip(names, confusion.tolist(), strict=True)) if confusion.numel() else {},
            _classes(team),
            [image for images in self._hard.values() for image in images],
        )
        for board in shown:
            board.show(evaluation, trainer.global_step)
            if self._history.steps:
                board.show_best(self._history, trainer.global_step)
        return report

    def _metadata(self, path: Path, report: Report) -> dict[str, Any]:
        """The step of a checkpoint, and the accuracy of each depth in the validation before it."""
        checkpoint = load_checkpoint(path, map_location="meta")
        step = checkpoint["global_step"]
        before = sum(validated <= step for validated in self._history.steps)
        per_depth = [
            {
                "net": row.net,
                "depth": row.depth,
                "macs": row.macs,
                "parameters": row.parameters,
                "accuracy": values[before - 1] if before else None,
            }
            for row, values in zip(report.rows, self._history.accuracies.values(), strict=True)
        ]
        return {"step": step, "epoch": checkpoint["epoch"], "per_depth": per_depth}


def _team(module: LightningModule) -> Team:
    if not isinstance(module, Team):
        raise TypeError(f"Dashboards shows a Team, found a {type(module).__name__}.")
    return module


def _classes(team: Team) -> list[str]:
    names = team.run.get("classes") or range(team.num_classes)
    return [str(name) for name in names]


def _pixels(image: Tensor) -> Tensor:
    """An image with its range stretched to 0 to 1, since it comes normalized."""
    image = image[:3] if len(image) >= 3 else image[:1]
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).eps)).float().cpu()


def _epochs(trainer: Trainer) -> float:
    """Number of epochs trained so far, in part if a validation is within one."""
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.current_epoch + (1.0 if batches == float("inf") else done / batches)


def _checkpoints(trainer: Trainer) -> dict[str, Path]:
    """The checkpoints of a run that are there, by their alias."""
    paths = {"best": getattr(trainer.checkpoint_callback, "best_model_path", "")}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            paths["last"] = callback.last_model_path
    return {alias: Path(path) for alias, path in paths.items() if path and Path(path).is_file()}

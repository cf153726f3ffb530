"""The report of every depth, printed and saved after an evaluation."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from teamnet_pl.callbacks.folder import results_folder, save_beside
from teamnet_pl.checkpoints import weights_digest
from teamnet_pl.cooperation import Team
from teamnet_pl.cooperation.report import Report, report_file
from teamnet_pl.cooperation.team import EvaluatedSplit
from teamnet_pl.places import short_path


class DepthReport(Callback):
    """Reports every depth of a `Team` after fit, validate and test.

    Prints a table, and saves it beside the checkpoints as ``per_depth.json`` (of a validation
    ``per_depth_val.json``), with a picture. An earlier result that differs is kept: the name then
    gets a number. Metrics are those of the last evaluation.

    Args:
        picture: Whether to draw accuracy against multiply-accumulates.
    """

    def __init__(self, picture: bool = True) -> None:
        self.picture = picture

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the last validation of a fit."""
        self._report(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports a validation that is not part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports a test."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, team: LightningModule, split: EvaluatedSplit) -> None:
        if not isinstance(team, Team):
            raise TypeError(f"DepthReport reports on a Team, found a {type(team).__name__}.")
        if not trainer.is_global_zero or f"{split}/accuracy/mean" not in trainer.callback_metrics:
            return
        report = team_report(team, trainer, split)
        Console().print(report.table())
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = save_beside(results_folder(trainer) / report_file(split), report.as_json())
        if self.picture:
            report.figure().savefig(path.with_suffix(".png"), dpi=150)
        print(f"Saved as {short_path(path)}")


def team_report(team: Team, trainer: Trainer, split: EvaluatedSplit) -> Report:
    """Gathers the last evaluation of a team.

    Args:
        team: The team.
        trainer: Evaluated it.
        split: The split that was evaluated.
    """
    prefix = f"{split}/"
    metrics = {
        name.removeprefix(prefix): value
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }
    return Report.of(
        team.elastic_nets,
        team.leader,
        team.input_shape,
        metrics,
        split=split,
        weights=weights_digest(team.state_dict()),
    )

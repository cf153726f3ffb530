"""Accuracy and cost of every depth: a table, a picture and a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.callbacks.folder import results_folder
from teamnet_pl.checkpoints import weights_digest
from teamnet_pl.cooperation import Team
from teamnet_pl.cooperation.team import Stage
from teamnet_pl.elastic import cost, depth_costs


@dataclass(frozen=True)
class Row:
    """One net at one depth, as in ``per_depth.json``.

    Attributes:
        split: ``val`` or ``test``.
        net: ``leader``, ``a``, ``b`` or ``ensemble`` (the Teammates' averaged prediction).
        depth: Name of the depth; None for a net with one depth.
        blocks_per_stage: Number of skippable blocks kept in each stage.
        macs: Multiply-accumulates for one image.
        parameters: Number of parameters.
        accuracy: Share of the images whose label is predicted first. This and the following are NaN
            if the prediction for any image is not finite, in the file ``null``.
        accuracy_top5: Share of those whose label is among the first five; None up to five classes.
        loss: Mean cross-entropy.
        calibration_error: Expected calibration error.
        weights: Digest of the whole team's weights, as `weights_digest` gives it.
    """

    split: Stage
    net: str
    depth: str | None
    blocks_per_stage: Sequence[int] | None
    macs: int
    parameters: int
    accuracy: float
    accuracy_top5: float | None
    loss: float
    calibration_error: float
    weights: str


class DepthReport(Callback):
    """Reports every depth of a `Team` after fit, validate and test.

    Prints a table, and saves ``per_depth.json`` and ``per_depth.png`` beside the checkpoints. The
    picture also goes to W&B and TensorBoard. Metrics are those of the last evaluation.

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

    def _report(self, trainer: Trainer, team: LightningModule, split: Stage) -> None:
        if not isinstance(team, Team):
            raise TypeError(f"DepthReport reports on a Team, found a {type(team).__name__}.")
        if not trainer.is_global_zero or f"{split}/accuracy/mean" not in trainer.callback_metrics:
            return
        rows = report_rows(team, split, {k: float(v) for k, v in trainer.callback_metrics.items()})
        Console().print(report_table(rows))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = results_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "per_depth.json", json.dumps(_records(rows), indent=2))
        if self.picture:
            figure = draw_report(rows)
            path = folder / "per_depth.png"
            figure.savefig(path, dpi=150)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("per_depth", [str(path)])
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("per_depth", figure, trainer.global_step)


def report_rows(team: Team, split: Stage, metrics: dict[str, float]) -> list[Row]:
    """Gathers what is known of each member.

    Args:
        team: The team.
        split: The split that was evaluated.
        metrics: By name, as the team logs them.

    Returns:
        The Leader, each depth of each Teammate, the deepest first, and the averaged prediction.
    """

    def row(
        net: str, depth: str | None, stages: Sequence[int] | None, macs: int, parameters: int
    ) -> Row:
        name = net if depth is None else f"{net}/{depth}"
        return Row(
            split, net, depth, stages, macs, parameters,
            accuracy=metrics[f"{split}/accuracy/{name}"],
            accuracy_top5=metrics.get(f"{split}/accuracy_top5/{name}"),
            loss=metrics[f"{split}/loss/{name}"],
            calibration_error=metrics[f"{split}/calibration_error/{name}"],
            weights=weights,
        )  # fmt: skip

    rows = []
    weights = weights_digest(team.state_dict())
    if team.leader is not None:
        whole = cost(team.leader, team.input_shape)
        rows.append(row("leader", None, None, whole.macs, whole.parameters))
    deepest = []
    for net_name, net in team.elastic_nets.items():
        costs = depth_costs(net, team.input_shape)
        deepest.append(next(iter(costs.values())))
        for depth in net.depths:
            own = costs[depth.name]
            rows.append(row(net_name, depth.name, depth.per_stage, own.macs, own.parameters))
    if len(deepest) > 1:
        macs = sum(own.macs for own in deepest)
        rows.append(row("ensemble", None, None, macs, sum(own.parameters for own in deepest)))
    return rows


def _records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as values that JSON knows: it has no NaN."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(row).items()
        }
        for row in rows
    ]


HEADER = ("depth", "blocks per stage", "MACs", "parameters", "accuracy A", "accuracy B")


def report_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Lays rows out for a table with `HEADER`, a depth that both Teammates have in one line."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: -row.macs):
        stages = "-".join(map(str, row.blocks_per_stage or ()))
        line = (row.depth or row.net, stages, f"{row.macs:,}", f"{row.parameters:,}")
        lines.setdefault(line, {})[row.net] = f"{row.accuracy:.2%}"
    # Leader and averaged prediction belong to neither Teammate.
    return [
        (*line, own.get("a", "") or own.get("leader", own.get("ensemble", "")), own.get("b", ""))
        for line, own in lines.items()
    ]


def report_table(rows: Sequence[Row]) -> Table:
    """Lays rows out as a table to print with rich."""
    table = Table(*HEADER, title=f"Accuracy per depth, {rows[0].split} split")
    for line in report_lines(rows):
        table.add_row(*line)
    return table


def draw_report(rows: Sequence[Row]) -> Figure:
    """Draws accuracy against multiply-accumulates, a line for each Teammate."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for net in dict.fromkeys(row.net for row in rows):
        own = [row for row in rows if row.net == net]
        macs, accuracy = [row.macs for row in own], [100 * row.accuracy for row in own]
        style = "o-" if len(own) > 1 else "*"
        name = f"Teammate {net.upper()}" if len(own) > 1 else net.capitalize()
        axes.plot(macs, accuracy, style, label=name, markersize=6 if len(own) > 1 else 11)
        for row in own:
            if row.depth is not None and math.isfinite(row.accuracy):
                point = (row.macs, 100 * row.accuracy)
                offset = (3, 5) if net == "a" else (3, -11)
                axes.annotate(row.depth, point, offset, textcoords="offset points", fontsize=8)
    axes.set_xlabel("multiply-accumulates per image")
    axes.set_ylabel(f"top-1 accuracy on the {rows[0].split} split, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure

"""Accuracy and cost of every member: rows, file, table and picture. Needs no Lightning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.cooperation.members import ENSEMBLE, LEADER
from teamnet_pl.elastic import AdaptiveNet, Cost, cost, depth_costs
from teamnet_pl.elastic.depths import format_stages
from teamnet_pl.errors import TeamNetError
from teamnet_pl.pictures import Label, add_legend, label_macs, label_points, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def report_file(split: str) -> str:
    """Returns the name of the report's file, beside the checkpoint that was evaluated."""
    return "per_depth.json" if split == "test" else f"per_depth_{split}.json"


def report_files(folder: Path) -> list[Path]:
    """Lists the reports in a folder: those of the test split first, and the oldest first."""
    files = [path for path in folder.glob("per_depth*.json") if path.is_file()]
    return sorted(files, key=lambda path: ("_val" in path.stem, len(path.stem), path.stem))


@dataclass(frozen=True)
class ReportRow:
    """One net at one depth.

    Attributes:
        split: Images that were evaluated, ``val`` or ``test``.
        net: ``leader``, the name of a Teammate, or ``ensemble`` (the Teammates' averaged
            prediction).
        depth: Name of the depth; None for a net with one depth.
        blocks_per_stage: Number of skippable blocks kept in each stage; None for such a net.
        macs: Multiply-accumulates for one image.
        parameters: Number of parameters.
        accuracy: Share of the images whose label is the most probable class. This, the loss and the
            calibration error are NaN if the prediction for any image is not finite, in the file
            ``null``.
        accuracy_top5: Share of those whose label is among the five most probable classes; None with
            five classes or fewer.
        loss: Mean cross-entropy.
        calibration_error: Expected calibration error.
        weights: Digest of the whole team's weights, as `weights_digest` returns it; None if it is
            not known.
    """

    split: str
    net: str
    depth: str | None
    blocks_per_stage: Sequence[int] | None
    macs: int
    parameters: int
    accuracy: float
    accuracy_top5: float | None
    loss: float
    calibration_error: float
    weights: str | None = None


@dataclass(frozen=True)
class Report:
    """The rows of one evaluation.

    Attributes:
        rows: The Leader, each depth of each Teammate, the deepest first, and the ensemble.
    """

    rows: tuple[ReportRow, ...]

    @classmethod
    def of(
        cls,
        teammates: Mapping[str, AdaptiveNet],
        leader: nn.Module | None,
        input_shape: Sequence[int],
        metrics: Mapping[str, Any],
        *,
        split: str,
        weights: str | None = None,
    ) -> Report:
        """Gathers the metrics and the cost of each member.

        Args:
            teammates: The Teammates by name.
            leader: The Leader, if there is one.
            input_shape: Shape of one image, ``(channels, height, width)``.
            metrics: By ``<metric>/<member>``, as `TeamMetrics.compute` returns them.
            split: Images that were evaluated, such as ``test``.
            weights: Digest of the weights.
        """
        costs = member_costs(teammates, leader, input_shape)

        def row(
            net: str, depth: str | None = None, stages: Sequence[int] | None = None
        ) -> ReportRow:
            member = net if depth is None else f"{net}/{depth}"
            price = costs[member]
            top5 = metrics.get(f"accuracy_top5/{member}")
            return ReportRow(
                split,
                net,
                depth,
                stages,
                price.macs,
                price.parameters,
                accuracy=float(metrics[f"accuracy/{member}"]),
                accuracy_top5=None if top5 is None else float(top5),
                loss=float(metrics[f"loss/{member}"]),
                calibration_error=float(metrics[f"calibration_error/{member}"]),
                weights=weights,
            )

        rows = [] if leader is None else [row(LEADER)]
        for name, net in teammates.items():
            rows += [row(name, depth.name, depth.per_stage) for depth in net.depths]
        if ENSEMBLE in costs:
            rows.append(row(ENSEMBLE))
        return cls(tuple(rows))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If it is not such a file.
        """
        path = Path(path)
        try:
            return cls(tuple(_row(record) for record in json.loads(path.read_text())))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise TeamNetError(
                f"{path} is not a report of a team ({type(error).__name__}: {error}). Delete it, "
                "or let `teamnet test` write it anew."
            ) from error

    def save(self, path: str | Path) -> None:
        """Saves the rows, as `as_json` writes them.

        Args:
            path: The file.

        Raises:
            OSError: If it cannot be written.
        """
        atomic_write_text(path, self.as_json())

    def as_json(self) -> str:
        """Writes the rows as JSON, where a number that is not finite is ``null``."""
        records = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(row).items()
            }
            for row in self.rows
        ]
        return json.dumps(records, indent=2)

    def of_net(self, name: str) -> list[ReportRow]:
        """Lists the rows of one net.

        Args:
            name: Name of a Teammate, ``leader`` or ``ensemble``.
        """
        return [row for row in self.rows if row.net == name]

    def table(self) -> Table:
        """Lays the rows out as a table to print with rich."""
        from rich.table import Table

        table = Table(*REPORT_HEADER, title=f"Accuracy per depth, {self.rows[0].split} split")
        for line in report_lines(self):
            table.add_row(*line)
        return table

    def figure(self) -> Figure:
        """Draws accuracy against multiply-accumulates, a line for each Teammate."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        labels = []
        for index, name in enumerate(dict.fromkeys(row.net for row in self.rows)):
            rows = self.of_net(name)
            macs, accuracies = [row.macs for row in rows], [100 * row.accuracy for row in rows]
            style = series_style(index)
            if rows[0].depth is None:
                axes.plot(macs, accuracies, label=name.capitalize(), ls="", ms=9, **style)
                continue
            axes.plot(macs, accuracies, label=f"Teammate {name.upper()}", **style)
            labels += [
                Label(row.macs, accuracy, str(row.depth), style["color"])
                for row, accuracy in zip(rows, accuracies, strict=True)
                if math.isfinite(accuracy)
            ]
        label_macs(axes)
        axes.set_ylabel(f"top-1 accuracy on the {self.rows[0].split} split, %")
        axes.grid(alpha=0.3)
        add_legend(figure, axes)
        label_points(axes, labels)
        return figure


def member_costs(
    teammates: Mapping[str, AdaptiveNet], leader: nn.Module | None, input_shape: Sequence[int]
) -> dict[str, Cost]:
    """Measures the cost of all that is evaluated.

    Args:
        teammates: The Teammates by name.
        leader: The Leader, if there is one.
        input_shape: Shape of one image, ``(channels, height, width)``.

    Returns:
        Costs by the member's name; that of the ensemble is the sum of its nets'.
    """
    costs = {} if leader is None else {LEADER: cost(leader, input_shape)}
    deepest = []
    for name, net in teammates.items():
        of_depths = depth_costs(net, input_shape)
        costs |= {f"{name}/{depth}": price for depth, price in of_depths.items()}
        deepest.append(of_depths[net.depths[0].name])
    if len(deepest) > 1:
        macs, parameters = (
            sum(getattr(price, name) for price in deepest) for name in ("macs", "parameters")
        )
        costs[ENSEMBLE] = Cost(macs, parameters)
    return costs


REPORT_HEADER = ("net", "depth", "blocks per stage", "MACs", "parameters", "accuracy")


def report_lines(report: Report) -> list[tuple[str, ...]]:
    """Lays the rows out for a table with `REPORT_HEADER`."""
    return [
        (
            row.net,
            row.depth or "",
            format_stages(row.blocks_per_stage or ()),
            f"{row.macs:,}",
            f"{row.parameters:,}",
            f"{row.accuracy:.2%}",
        )
        for row in report.rows
    ]


_TYPES: dict[str, tuple[type, ...]] = {
    "split": (str,),
    "net": (str,),
    "depth": (str, type(None)),
    "blocks_per_stage": (list, type(None)),
    "macs": (int,),
    "parameters": (int,),
    "accuracy": (float, int, type(None)),
    "accuracy_top5": (float, int, type(None)),
    "loss": (float, int, type(None)),
    "calibration_error": (float, int, type(None)),
    "weights": (str, type(None)),
}


def _row(record: Mapping[str, Any]) -> ReportRow:
    """Makes a row of the values in a file.

    Raises:
        TeamNetError: If a value has the wrong type.
    """
    values: dict[str, Any] = {field.name: record.get(field.name) for field in fields(ReportRow)}
    for name, value in values.items():
        if type(value) not in _TYPES[name]:
            raise ValueError(f"{name} cannot be {value!r}")
    for name in ("accuracy", "loss", "calibration_error"):
        values[name] = math.nan if values[name] is None else float(values[name])
    return ReportRow(**values)

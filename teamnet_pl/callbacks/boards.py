"""What each kind of dashboard can show of a team: W&B, TensorBoard and MLflow."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from teamnet_pl.cooperation.members import ENSEMBLE, LEADER
from teamnet_pl.cooperation.report import Report, ReportRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "Accuracy of all depths"
BEST_IS: Mapping[str, str] = {
    "accuracy": "max",
    "accuracy_top5": "max",
    "calibration_error": "min",
    "disagreement": "min",
    "loss": "min",
}
"""Whether the highest or the lowest value of a metric is the best."""


@dataclass(frozen=True)
class HardImage:
    """An image that the deepest depth of a Teammate gets right, and the shallowest does not.

    Attributes:
        pixels: Shape ``(channels, height, width)``, from 0 to 1.
        label: Name of its class.
        net: Name of the Teammate.
        predicted: Name of the predicted class by the name of the depth, the deepest first.
    """

    pixels: Tensor
    label: str
    net: str
    predicted: Mapping[str, str]

    @property
    def right_from(self) -> str:
        """The shallowest depth that is right, as are all deeper ones."""
        right = ""
        for depth, predicted in self.predicted.items():
            if predicted != self.label:
                break
            right = depth
        return right


@dataclass(frozen=True)
class Evaluation:
    """The outcome of the evaluation of one split.

    Attributes:
        report: Accuracy and cost of each member.
        agreement: Share of the images for which two members agree, by their names.
        confusion: Number of images by true and by predicted label, ``(classes, classes)``, by the
            member's name; empty with too many classes.
        classes: Names of the classes.
        images: Images that need depth.
    """

    report: Report
    agreement: Mapping[str, Mapping[str, float]]
    confusion: Mapping[str, Sequence[Sequence[int]]]
    classes: Sequence[str]
    images: Sequence[HardImage] = ()

    @property
    def split(self) -> str:
        """The split that was evaluated."""
        return self.report.rows[0].split


@dataclass
class History:
    """The accuracies of a run over its validations.

    Attributes:
        epochs: Trained epochs, whole or in part.
        steps: Steps of the optimizer.
        accuracies: Accuracy by the member's name.
    """

    epochs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracies: dict[str, list[float]] = field(default_factory=dict)

    def add(self, epoch: float, step: int, accuracies: Mapping[str, float]) -> None:
        """Adds a validation."""
        self.epochs.append(epoch)
        self.steps.append(step)
        for member, accuracy in accuracies.items():
            self.accuracies.setdefault(member, []).append(accuracy)

    def of_net(self, name: str) -> dict[str, list[float]]:
        """The accuracies of each depth of a Teammate, by the depth's name."""
        return {
            member.removeprefix(f"{name}/"): values
            for member, values in self.accuracies.items()
            if member.startswith(f"{name}/")
        }


LoggerT = TypeVar("LoggerT", bound=Logger)


class Board(ABC, Generic[LoggerT]):
    """A dashboard behind a logger.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: LoggerT) -> None:
        self.logger = logger

    def define(self, names: Sequence[str], depths: Mapping[str, Sequence[str]]) -> None:
        """Tells the dashboard of the metrics before they come.

        Args:
            names: Of all metrics.
            depths: The names of each Teammate's depths.
        """

    def show_history(self, history: History, nets: Iterable[str], step: int) -> None:
        """Shows all depths of each Teammate over the epochs so far."""

    def show_best(self, history: History, step: int) -> None:
        """Shows the best values of a run."""

    @abstractmethod
    def show(self, evaluation: Evaluation, step: int) -> None:
        """Shows the outcome of an evaluation."""

    @property
    def takes_checkpoints(self) -> bool:
        """Whether the user asked the logger to keep checkpoints."""
        return bool(getattr(self.logger, "_log_model", False))

    def keep_checkpoint(self, path: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Keeps a checkpoint with the run.

        Args:
            path: The file.
            alias: ``best`` or ``last``.
            metadata: Plain values, such as the accuracy of each depth.
        """

    def keep_file(self, path: Path) -> None:
        """Keeps a small file with the run."""


class WandbBoard(Board[WandbLogger]):
    """Weights & Biases: tables, charts that overlay runs, and artifacts."""

    STEP: ClassVar[str] = "trainer/global_step"

    def define(self, names: Sequence[str], depths: Mapping[str, Sequence[str]]) -> None:
        """Sets which value of a metric is the best, and leaves out panels of a single depth."""
        for name in names:
            split, metric, member = (*name.split("/", 2), "")[:3]
            in_chart = metric in (*BEST_IS, "ce", "kd", "features")
            summarized = split == "val" and metric in BEST_IS
            has_panel = metric == "accuracy" and member in ("mean", LEADER, ENSEMBLE)
            self.logger.experiment.define_metric(
                name,
                step_metric=self.STEP,
                hidden=split == "test" or (in_chart and member and not has_panel) or None,
                summary=f"{BEST_IS[metric]},last" if summarized else None,
            )
        for axis in (self.STEP, "epoch"):
            self.logger.experiment.define_metric(axis, hidden=True)

    def show_history(self, history: History, nets: Iterable[str], step: int) -> None:
        """Shows a chart for each Teammate."""
        from wandb.plot import line_series

        charts: dict[str, Any] = {
            f"depths/{net}": line_series(
                history.epochs,
                list(history.of_net(net).values()),
                keys=list(history.of_net(net)),
                title=f"Teammate {net}: validation accuracy of all depths",
                xname="epoch",
                split_table=True,
            )
            for net in nets
        }
        self.logger.log_metrics(charts, step)

    def show(self, evaluation: Evaluation, step: int) -> None:
        """Shows tables and charts."""
        from wandb import Image, Table
        from wandb.plot import line
        from wandb.plot.custom_chart import plot_table

        split = evaluation.split
        shown: dict[str, Any] = {}
        rows = [asdict(row) for row in evaluation.report.rows]
        for row in rows:
            row["blocks_per_stage"] = "-".join(map(str, row["blocks_per_stage"] or ()))
        shown[f"depths/{split}"] = Table(list(rows[0]), [list(row.values()) for row in rows])
        shown[f"depths/{split}_picture"] = Image(_image(evaluation.report.figure()))
        for net, depths in nets_with_depths(evaluation.report).items():
            points = [[row.macs, row.accuracy, row.depth] for row in depths]
            shown[f"depths/{split}_macs/{net}"] = line(
                Table(["MACs", "accuracy", "depth"], points),
                "MACs",
                "accuracy",
                title=f"Teammate {net}: {split} accuracy against MACs",
                split_table=True,
            )
        shares = [[name, *of.values()] for name, of in evaluation.agreement.items()]
        shown[f"agreement/{split}"] = Table(["member", *evaluation.agreement], shares)
        shown[f"agreement/{split}_picture"] = Image(_image(agreement_figure(evaluation)))
        columns: list[str | int] = [
            "Actual",
            "Predicted",
            "nPredictions",
        ]  # as the chart of W&B names them
        for member, counts in evaluation.confusion.items():
            cells = [
                [actual, predicted, number]
                for actual, line_of in zip(evaluation.classes, counts, strict=True)
                for predicted, number in zip(evaluation.classes, line_of, strict=True)
            ]
            shown[f"confusion_{split}/{member}"] = plot_table(
                "wandb/confusion_matrix/v1",
                Table(columns, cells),
                {str(column): column for column in columns},
                {"title": f"{member}: {split} images by true and predicted class"},
                split_table=True,
            )
        if evaluation.images:
            hard = [
                [
                    Image((image.pixels * 255).byte().movedim(0, -1).numpy()),
                    image.label,
                    image.net,
                    image.right_from,
                    " ".join(f"{depth}:{name}" for depth, name in image.predicted.items()),
                ]
                for image in evaluation.images
            ]
            columns = ["image", "label", "net", "right from", "predicted"]
            shown[f"images/{split}_need_depth"] = Table(columns, hard)
        self.logger.log_metrics(shown, step)

    def keep_checkpoint(self, path: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Logs an artifact of the name that the logger uses."""
        import wandb

        name = self.logger._checkpoint_name or f"model-{self.logger.experiment.id}"
        artifact = wandb.Artifact(name, "model", metadata=dict(metadata))
        artifact.add_file(str(path), name="model.ckpt", policy=self.logger.add_file_policy)
        self.logger.experiment.log_artifact(artifact, aliases=[alias])
        # So that the logger does not upload it again, without the metadata.
        self.logger._logged_model_time[str(path)] = path.stat().st_mtime


class TensorBoardBoard(Board[TensorBoardLogger]):
    """TensorBoard: charts of several scalars, and pictures."""

    def define(self, names: Sequence[str], depths: Mapping[str, Sequence[str]]) -> None:
        """Lays out a chart of all depths for each Teammate."""
        charts = {
            f"Teammate {net}": [f"^val/accuracy/{re.escape(f'{net}/{depth}')}$" for depth in each]
            for net, each in depths.items()
        }
        layout = {CURVES: {title: ["Multiline", tags] for title, tags in charts.items()}}
        self.logger.experiment.add_custom_scalars(layout)

    def show_best(self, history: History, step: int) -> None:
        """Gives the page of hyper-parameters the best mean accuracy."""
        if getattr(self.logger, "_default_hp_metric", False):
            self.logger.log_metrics({"hp_metric": max(mean_accuracies(history))}, step)

    def show(self, evaluation: Evaluation, step: int) -> None:
        """Shows pictures."""
        for name, figure in figures(evaluation).items():
            self.logger.experiment.add_figure(name, figure, step)


class MLflowBoard(Board[MLFlowLogger]):
    """MLflow: the best values as metrics, the data and pictures as artifacts."""

    def show_best(self, history: History, step: int) -> None:
        """Logs the best accuracies, and a picture of all."""
        best = {f"best/accuracy/{name}": max(values) for name, values in history.accuracies.items()}
        self.logger.log_metrics(best | {"best/accuracy/mean": max(mean_accuracies(history))}, step)

    def show(self, evaluation: Evaluation, step: int) -> None:
        """Keeps pictures, and their data as JSON."""
        split = evaluation.split
        for name, figure in figures(evaluation).items():
            self._client.log_figure(self.logger.run_id, figure, f"{name}.png")
        for name, values in {
            "per_depth": [asdict(row) for row in evaluation.report.rows],
            "agreement": evaluation.agreement,
            "confusion": evaluation.confusion,
        }.items():
            self._client.log_dict(self.logger.run_id, values, f"{name}/{split}.json")

    def keep_checkpoint(self, path: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Keeps the file in a folder of the alias, with the metadata."""
        self._client.log_artifact(self.logger.run_id, str(path), alias)
        self._client.log_dict(self.logger.run_id, dict(metadata), f"{alias}/metadata.json")
        self.logger._logged_model_time[str(path)] = path.stat().st_mtime

    def keep_file(self, path: Path) -> None:
        """Keeps a small file with the run."""
        self._client.log_artifact(self.logger.run_id, str(path))

    @property
    def _client(self) -> Any:
        return self.logger.experiment


def boards(loggers: Iterable[Logger]) -> list[Board[Any]]:
    """Makes the dashboards behind loggers; a logger to a file has none."""
    kinds: dict[type[Logger], type[Board[Any]]] = {
        WandbLogger: WandbBoard,
        TensorBoardLogger: TensorBoardBoard,
        MLFlowLogger: MLflowBoard,
    }
    return [
        board(logger)
        for logger in loggers
        for kind, board in kinds.items()
        if isinstance(logger, kind)
    ]


def nets_with_depths(report: Report) -> dict[str, list[ReportRow]]:
    """The rows of each net that has several depths, by its name."""
    nets = dict.fromkeys(row.net for row in report.rows if row.depth is not None)
    return {net: report.of_net(net) for net in nets}


def mean_accuracies(history: History) -> list[float]:
    """The mean accuracy of all depths of all Teammates in each validation."""
    depths = [values for member, values in history.accuracies.items() if "/" in member]
    return [sum(values) / len(values) for values in zip(*depths, strict=True)]


def figures(evaluation: Evaluation) -> dict[str, Figure]:
    """Draws all that is known of an evaluation, by ``<figure>/<split>``."""
    split = evaluation.split
    drawn = {
        f"per_depth/{split}": evaluation.report.figure(),
        f"agreement/{split}": agreement_figure(evaluation),
    }
    for member, counts in evaluation.confusion.items():
        title = f"{member}: {split} images"
        axes = ("predicted class", "true class")
        drawn[f"confusion/{split}/{member}"] = matrix_figure(
            counts, evaluation.classes, title, axes, "{:.0f}"
        )
    if evaluation.images:
        drawn[f"images_that_need_depth/{split}"] = images_figure(evaluation.images)
    return drawn


def agreement_figure(evaluation: Evaluation) -> Figure:
    """Draws how often each two members predict the same class."""
    values = [list(shares.values()) for shares in evaluation.agreement.values()]
    title = f"Share of the {evaluation.split} images with the same prediction"
    return matrix_figure(values, list(evaluation.agreement), title, ("", ""), "{:.2f}")


def matrix_figure(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    title: str,
    axes_names: tuple[str, str],
    number: str,
) -> Figure:
    """Draws a square matrix.

    Args:
        values: Its rows.
        names: Of its rows and columns.
        title: Title of the picture.
        axes_names: Names of the horizontal and the vertical axis.
        number: Format of the values, which are written where there are few.
    """
    from matplotlib.figure import Figure

    size = len(names)
    figure = Figure(figsize=(5 + size / 8, 4.5 + size / 8), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0)
    axes.set_title(title)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    if size <= 20:
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
        highest = max(max(line) for line in values)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "black" if value > 0.6 * highest else "white"
                text = number.format(value)
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    figure.colorbar(image)
    return figure


def images_figure(images: Sequence[HardImage]) -> Figure:
    """Draws images that need depth, with the label and the depth from which they are right."""
    from matplotlib.figure import Figure

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    for index, image in enumerate(images, start=1):
        axes = figure.add_subplot(rows, columns, index)
        pixels = image.pixels.movedim(0, -1).numpy()
        axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray")
        shallowest = list(image.predicted)[-1]
        axes.set_title(
            f"{image.label}: {image.net} from {image.right_from}\n"
            f"{shallowest} says {image.predicted[shallowest]}",
            fontsize=8,
        )
        axes.axis("off")
    return figure


def _image(figure: Figure) -> Any:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return Image.open(file)

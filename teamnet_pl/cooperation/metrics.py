"""Metrics of each member: the same in every precision, and NaN where a prediction is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from teamnet_pl.cooperation.members import LEADER, depth_names, evaluated_names
from teamnet_pl.elastic import AdaptiveNet


class _OfAllImages(Metric):
    """Mixin: NaN if the prediction for any image is not finite, or if there was no image.

    States keep their type whatever type a net is converted to: sums in half precision are wrong.
    """

    images: Tensor
    non_finite: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("images", "non_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch, which may be empty.

        Args:
            preds: Class probabilities, shape ``(N, classes)``.
            target: Labels, shape ``(N,)``.
        """
        self.images += len(preds)
        self.non_finite += (~preds.isfinite()).any(dim=-1).sum()
        if len(preds):
            super().update(preds.nan_to_num(0, 0, 0), target)  # type: ignore[safe-super]

    def compute(self) -> Tensor:
        """Returns the value over all images so far, a scalar."""
        if not self.images or self.non_finite:
            return torch.full((), torch.nan, device=self.images.device)
        value: Tensor = super().compute()  # type: ignore[safe-super]
        return value

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class Accuracy(_OfAllImages, MulticlassAccuracy):
    """Share of the images whose label is among the ``top_k`` most probable classes."""


class CalibrationError(_OfAllImages, MulticlassCalibrationError):
    """Expected calibration error."""


class _NegativeLogLikelihood(Metric):
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        log_likelihood = preds.clamp_min(torch.finfo(preds.dtype).tiny).log()
        self.total += F.nll_loss(log_likelihood, target, reduction="sum")

    def compute(self) -> Tensor:
        return self.total


class CrossEntropy(_OfAllImages, _NegativeLogLikelihood):
    """Mean cross-entropy."""

    def compute(self) -> Tensor:
        """Returns the mean over all images so far, a scalar."""
        return super().compute() / self.images


def member_metrics(num_classes: int) -> nn.ModuleDict:
    """Makes the metrics of one member, by name.

    Args:
        num_classes: Number of classes; with five or fewer there is no ``accuracy_top5``.

    Examples:
        >>> metrics = member_metrics(3)
        >>> probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.5, torch.nan]])
        >>> metrics["accuracy"].update(probabilities[:1], torch.tensor([0]))
        >>> metrics["accuracy"].compute()
        tensor(1.)
        >>> metrics["accuracy"].update(probabilities[1:], torch.tensor([0]))
        >>> metrics["accuracy"].compute()
        tensor(nan)
    """
    metrics: dict[str, Metric] = {
        "accuracy": Accuracy(num_classes, average="micro"),
        "calibration_error": CalibrationError(num_classes),
        "loss": CrossEntropy(),
    }
    if num_classes > 5:
        metrics["accuracy_top5"] = Accuracy(num_classes, average="micro", top_k=5)
    return nn.ModuleDict(metrics)


MOST_CONFUSED_CLASSES = 100
"""Number of classes up to which confusion is counted: its size grows with the square."""


class Predictions(NamedTuple):
    """The predicted labels of all members, counted over an evaluation.

    Attributes:
        agreement: Share of the images for which two members predict the same label, shape
            ``(members, members)``; NaN for a member of which a prediction is not finite.
        confusion: Number of images by true and by predicted label, shape
            ``(members, classes, classes)``, or ``(members, 0, 0)`` with more than
            `MOST_CONFUSED_CLASSES` classes. Predictions that are not finite are not counted.
    """

    agreement: Tensor
    confusion: Tensor


class PredictionCounts(Metric):
    """Counts the predicted labels of all members, see `Predictions`.

    Args:
        members: Number of members.
        num_classes: Number of classes.

    Examples:
        >>> counts = PredictionCounts(members=2, num_classes=3)
        >>> labels = torch.tensor([0, 1, 2, 2])
        >>> wrong = torch.tensor([0, 1, 1, 1])
        >>> counts.update(torch.stack([torch.eye(3)[labels], torch.eye(3)[wrong]]), labels)
        >>> agreement, confusion = counts.compute()
        >>> agreement
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
        >>> confusion[1]
        tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 2, 0]])
    """

    images: Tensor
    non_finite: Tensor
    agreeing: Tensor
    confusion: Tensor

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()
        classes = num_classes if num_classes <= MOST_CONFUSED_CLASSES else 0
        for name, shape in {
            "images": (),
            "non_finite": (members,),
            "agreeing": (members, members),
            "confusion": (members, classes, classes),
        }.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch, which may be empty.

        Args:
            preds: Class probabilities, shape ``(members, N, classes)``.
            target: Labels, shape ``(N,)``.
        """
        finite = preds.isfinite().all(dim=-1)
        labels = preds.argmax(dim=-1)
        self.images += len(target)
        self.non_finite += (~finite).sum(dim=1)
        self.agreeing += (labels[:, None] == labels).sum(dim=-1)
        members, classes = self.confusion.shape[:2]
        if classes:
            offsets = torch.arange(members, device=labels.device)[:, None] * classes**2
            cells = (offsets + target * classes + labels)[finite]
            counts = cells.bincount(minlength=self.confusion.numel())
            self.confusion += counts.view_as(self.confusion)

    def compute(self) -> Predictions:
        """Returns the counts over all images so far."""
        shares = self.agreeing / self.images
        undefined = self.non_finite > 0
        shares = shares.masked_fill(undefined | undefined[:, None], torch.nan)
        return Predictions(shares, self.confusion.clone())


class TeamMetrics(nn.Module):
    """The metrics of each member of a team. Needs no Lightning.

    Args:
        teammates: The Teammates by name.
        leader: The Leader, if there is one.
        num_classes: Number of classes.

    Attributes:
        predictions: The predicted labels of the members, in the order of `names`.

    Examples:
        >>> import torchvision
        >>> from teamnet_pl.elastic import ElasticNet
        >>> net = ElasticNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=2)
        >>> metrics = TeamMetrics({"a": net}, None, num_classes=10)
        >>> probabilities = {"a/d5": torch.eye(10), "a/d0": torch.eye(10).roll(1, 0)}
        >>> metrics.update(probabilities, torch.arange(10))
        >>> {name: float(value) for name, value in metrics.compute().items() if "accuracy/" in name}
        {'accuracy/a/d5': 1.0, 'accuracy/a/d0': 0.0, 'accuracy/mean': 0.5}
    """

    def __init__(
        self, teammates: Mapping[str, AdaptiveNet], leader: nn.Module | None, num_classes: int
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict(
            {member: member_metrics(num_classes) for member in evaluated_names(teammates, leader)}
        )
        self._depths = depth_names(teammates)
        self._deepest_of = {
            f"{name}/{depth}": f"{name}/{net.depths[0]}"
            for name, net in teammates.items()
            for depth in net.depths[1:]
        }
        self.predictions = PredictionCounts(len(self.members), num_classes)

    @property
    def names(self) -> list[str]:
        """The members' names."""
        return list(self.members)

    def value_names(self) -> list[str]:
        """Lists the names of all values that `compute` returns."""
        return [
            *(f"{name}/{member}" for name, member, _ in self.metrics()),
            *(f"disagreement/{depth}" for depth in self._deepest_of),
            "accuracy/mean",
        ]

    def metrics(self) -> Iterator[tuple[str, str, Metric]]:
        """Yields each metric with its name and its member's name."""
        for member, metrics in self.members.items():
            for name, metric in metrics.items():  # type: ignore[operator]
                yield name, member, metric

    def update(self, probabilities: Mapping[str, Tensor], target: Tensor) -> None:
        """Adds a batch, which may be empty.

        Args:
            probabilities: By the member's name, each ``(N, classes)``, as `member_probabilities`
                returns them.
            target: Labels, shape ``(N,)``.
        """
        for _, member, metric in self.metrics():
            metric.update(probabilities[member], target)
        stacked = torch.stack([probabilities[member] for member in self.names])
        self.predictions.update(stacked, target)

    def disagreements(self) -> dict[str, Tensor]:
        """Returns how often each shallower depth differs from the deepest of its Teammate.

        Returns:
            Shares of the images by ``disagreement/<member>``, as scalars.
        """
        agreement, index = self.predictions.compute().agreement, self.names.index
        return {
            f"disagreement/{depth}": 1 - agreement[index(depth), index(deepest)]
            for depth, deepest in self._deepest_of.items()
        }

    def mean_accuracy(self) -> Tensor:
        """Returns the mean accuracy of all depths of all Teammates, a scalar."""
        accuracies = [self.members[depth]["accuracy"].compute() for depth in self._depths]  # type: ignore[index]
        return torch.stack(accuracies).mean()

    def compute(self) -> dict[str, Tensor]:
        """Returns all metrics by ``<metric>/<member>``, and ``accuracy/mean``, as scalars."""
        values = {f"{name}/{member}": metric.compute() for name, member, metric in self.metrics()}
        return values | self.disagreements() | {"accuracy/mean": self.mean_accuracy()}

    def reset(self) -> None:
        """Starts anew, such as for another evaluation."""
        for _, _, metric in self.metrics():
            metric.reset()
        self.predictions.reset()


def batch_accuracies(logits: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """Measures the accuracy of the members in one batch.

    Args:
        logits: By the member's name, each ``(N, classes)``.
        target: Labels, shape ``(N,)``, or probabilities of the classes, ``(N, classes)``, of which
            the most probable one counts.

    Returns:
        Accuracies by ``accuracy/<member>``, and ``accuracy/mean`` over all but the Leader, as
        scalars.

    Examples:
        >>> logits = {"leader": torch.eye(2), "a/d1": torch.ones(2, 1) * torch.tensor([0.0, 1.0])}
        >>> accuracies = batch_accuracies(logits, torch.tensor([0, 1]))
        >>> {name: value.item() for name, value in accuracies.items()}
        {'accuracy/leader': 1.0, 'accuracy/a/d1': 0.5, 'accuracy/mean': 0.5}
    """
    labels = target if target.ndim == 1 else target.argmax(dim=-1)
    right = torch.stack([values.argmax(dim=-1) for values in logits.values()]) == labels
    shares = dict(zip(logits, right.float().mean(dim=1), strict=True))
    accuracies = {f"accuracy/{member}": share for member, share in shares.items()}
    if depths := [share for member, share in shares.items() if member != LEADER]:
        accuracies["accuracy/mean"] = torch.stack(depths).mean()
    return accuracies

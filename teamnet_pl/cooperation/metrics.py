"""Metrics of each member: the same in every precision, and NaN where a prediction is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from teamnet_pl.cooperation.members import depth_names, evaluated_names
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


class TeamMetrics(nn.Module):
    """The metrics of each member of a team. Needs no Lightning.

    Args:
        teammates: The Teammates by name.
        leader: The Leader, if there is one.
        num_classes: Number of classes.

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

    def mean_accuracy(self) -> Tensor:
        """Returns the mean accuracy of all depths of all Teammates, a scalar."""
        accuracies = [self.members[depth]["accuracy"].compute() for depth in self._depths]  # type: ignore[index]
        return torch.stack(accuracies).mean()

    def compute(self) -> dict[str, Tensor]:
        """Returns all metrics by ``<metric>/<member>``, and ``accuracy/mean``, as scalars."""
        values = {f"{name}/{member}": metric.compute() for name, member, metric in self.metrics()}
        return values | {"accuracy/mean": self.mean_accuracy()}

    def reset(self) -> None:
        """Starts anew, such as for another evaluation."""
        for _, _, metric in self.metrics():
            metric.reset()

"""Kinds of transfer: the losses by which a student learns from a teacher's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor

from teamnet_pl.errors import TeamNetError


class TransferKind(ABC):
    """The loss of a transfer, chosen by its class path.

    A kind of your own is a frozen dataclass that derives from this class. Its fields are its
    options, on the command line, in YAML and in checkpoints.

    Examples:
        >>> @dataclass(frozen=True)
        ... class MeanSquaredError(TransferKind):
        ...     scale: float = 1.0
        ...
        ...     def __call__(self, student, teacher, target):
        ...         return self.scale * F.mse_loss(student, teacher)
        >>> import torch
        >>> MeanSquaredError(scale=0.5)(torch.zeros(4, 10), torch.ones(4, 10), torch.arange(4))
        tensor(0.5000)
    """

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch.

        Args:
            student: Logits, shape ``(N, classes)``.
            teacher: Logits, shape ``(N, classes)``, without gradient.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.

        Returns:
            The mean over the batch, a scalar.
        """

    def describe(self) -> dict[str, Any]:
        """Returns the kind as plain values: ``class_path`` and ``init_args``.

        Raises:
            TeamNetError: If it is not a dataclass, so that its options are not known.
        """
        kind = type(self)
        if not is_dataclass(self):
            raise TeamNetError(
                f"The kind of transfer {kind.__name__} must be a dataclass, so that its options "
                "can be saved: decorate it with @dataclass(frozen=True)."
            )
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": options}


@dataclass(frozen=True)
class KLDivergence(TransferKind):
    """Kullback-Leibler divergence of softened predictions, see `distillation_loss`.

    Attributes:
        temperature: Divisor of the logits of the teacher and of the student.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch, see `TransferKind`."""
        return distillation_loss(student, teacher, self.temperature)


@dataclass(frozen=True)
class StandardizedKL(TransferKind):
    """Kullback-Leibler divergence of standardized logits, each image's of mean 0 and deviation 1.

    The student need not match the scale of the teacher's logits, only their relations.

    Attributes:
        temperature: Divisor of the standardized logits of the teacher and of the student.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427).
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch, see `TransferKind`."""
        return distillation_loss(_standardized(student), _standardized(teacher), self.temperature)


@dataclass(frozen=True)
class DecoupledKL(TransferKind):
    """Decoupled distillation: the target class against all others, and the others among themselves.

    The second part, which the confidence of the teacher hides in the plain divergence, has a weight
    of its own. Of mixed labels, the most probable class is the target.

    Attributes:
        alpha: Weight of the target class against all others.
        beta: Weight of the other classes among themselves.
        temperature: Divisor of the logits of the teacher and of the student.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679).
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)
        if self.alpha < 0 or self.beta < 0:
            raise TeamNetError(
                f"alpha and beta must not be negative, found {self.alpha} and {self.beta}."
            )

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch, see `TransferKind`."""
        labels = target if target.ndim == 1 else target.argmax(dim=-1)
        is_target = F.one_hot(labels, student.shape[-1]).bool()
        target_part = _binary_divergence(
            student / self.temperature, teacher / self.temperature, is_target
        )
        student_others, teacher_others = (  # as if there were no target class
            logits[~is_target].view(len(labels), -1) for logits in (student, teacher)
        )
        others_part = distillation_loss(student_others, teacher_others, self.temperature)
        return self.alpha * self.temperature**2 * target_part + self.beta * others_part


@dataclass(frozen=True)
class DIST(TransferKind):
    """Correlation of predictions: of each image over the classes, of each class over the batch.

    Attributes:
        beta: Weight of the relations between the classes of each image.
        gamma: Weight of the relations between the images of each class.
        temperature: Divisor of the logits of the teacher and of the student.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536).
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)
        if self.beta < 0 or self.gamma < 0:
            raise TeamNetError(
                f"beta and gamma must not be negative, found {self.beta} and {self.gamma}."
            )

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch, see `TransferKind`."""
        student, teacher = (
            (logits / self.temperature).softmax(dim=-1) for logits in (student, teacher)
        )
        between_classes = 1 - _correlation(student, teacher).mean()
        between_images = 1 - _correlation(student.T, teacher.T).mean()
        total = self.beta * between_classes + self.gamma * between_images
        return self.temperature**2 * total


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Computes the Kullback-Leibler divergence of softened predictions.

    It is multiplied by the temperature squared, so that its gradients keep their size.

    Args:
        student: Logits, shape ``(N, classes)``.
        teacher: Logits, shape ``(N, classes)``; no gradient flows into them.
        temperature: Divisor of both.

    Returns:
        The mean over the batch, a scalar.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    Examples:
        >>> import torch
        >>> logits = torch.randn(4, 10)
        >>> distillation_loss(logits, logits, temperature=2.0).item()
        0.0
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher.detach() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def _check_positive(name: str, value: float) -> None:
    if value <= 0:
        raise TeamNetError(f"A transfer's {name} must be > 0, found {value}.")


def _standardized(logits: Tensor) -> Tensor:
    mean, std = logits.mean(dim=-1, keepdim=True), logits.std(dim=-1, keepdim=True)
    return (logits - mean) / (std + 1e-7)


def _binary_divergence(student: Tensor, teacher: Tensor, is_target: Tensor) -> Tensor:
    """Divergence of the target class against all others, the mean over the batch."""
    terms = []
    for is_class in (is_target, ~is_target):
        # Sums of probabilities, as logarithms, since some are too small for a number.
        log_student, log_teacher = (
            torch.logsumexp(logits.log_softmax(dim=-1).masked_fill(~is_class, -torch.inf), dim=-1)
            for logits in (student, teacher)
        )
        terms.append(log_teacher.exp() * (log_teacher - log_student))
    return torch.stack(terms).sum(dim=0).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of two matrices."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    return F.cosine_similarity(a, b, dim=-1)

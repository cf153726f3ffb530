"""Kinds of transfer: the losses by which a student learns from a teacher's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor

from teamnet_pl.errors import TeamNetError


class TransferKind(ABC):
    """The loss of a transfer, chosen by its class path.

    A kind of your own is a frozen dataclass that derives from this class. Its fields are its
    options, on the command line, in YAML and in checkpoints.

    Example:
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
        if self.temperature <= 0:
            raise TeamNetError(f"A transfer's temperature must be > 0, found {self.temperature}.")

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of one batch, see `TransferKind`."""
        return distillation_loss(student, teacher, self.temperature)


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

    Example:
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

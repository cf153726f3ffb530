"""The loss of a team: labels and transfers, from a mapping of logits to a scalar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor, nn

from teamnet_pl.cooperation.transfers import Cooperation
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class LossTerms:
    """Every term of the loss of one batch, unweighted, as scalars.

    Attributes:
        labels: Label loss by the member's name.
        transfers: Loss of each transfer by its name, such as ``leader->a/d7``.
    """

    labels: Mapping[str, Tensor]
    transfers: Mapping[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Returns all terms by the names that they are logged under.

        Returns:
            ``ce/<member>`` for each label loss and ``kd/<teacher>-><student>`` for each transfer.
        """
        labels = {f"ce/{member}": term for member, term in self.labels.items()}
        return labels | {f"kd/{transfer}": term for transfer, term in self.transfers.items()}


class CooperativeLoss(nn.Module):
    """The sum of every member's label loss and of every transfer, weighted.

    It needs no Lightning, and no net: logits by the member's name are its input.

    Args:
        teammates: Each Teammate's depths or their names, the deepest first.
        cooperation: The transfers.
        leader: Whether there is a Leader.
        leader_frozen: Whether the Leader only teaches, without a label loss of its own.
        label_smoothing: Share of the label spread over all classes, from 0 to 1.

    Attributes:
        transfers: The transfers between the members.

    Raises:
        TeamNetError: If the label smoothing is out of range or a transfer does not fit the members.

    Example:
        >>> criterion = CooperativeLoss({"a": ["d2", "d0"]}, leader=True)
        >>> [str(transfer) for transfer in criterion.transfers]
        ['leader->a/d2', 'a/d2->a/d0']
        >>> logits = {name: torch.randn(4, 10) for name in ("leader", "a/d2", "a/d0")}
        >>> criterion(logits, torch.tensor([1, 2, 3, 4])).shape
        torch.Size([])
    """

    def __init__(
        self,
        teammates: Mapping[str, Sequence[object]],
        cooperation: Cooperation | None = None,
        *,
        leader: bool = True,
        leader_frozen: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise TeamNetError(f"label_smoothing must be in [0, 1), found {label_smoothing}.")
        self.cooperation = Cooperation() if cooperation is None else cooperation
        self.transfers = self.cooperation.transfers(teammates, leader)
        self.leader_frozen = leader_frozen
        self.label_smoothing = label_smoothing

    def terms(self, logits: Mapping[str, Tensor], target: Tensor) -> LossTerms:
        """Computes every term of the loss, unweighted.

        Args:
            logits: By the member's name, each ``(N, classes)``.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.
        """
        labels = {
            member: F.cross_entropy(values, target, label_smoothing=self.label_smoothing)
            for member, values in logits.items()
            if not (member == "leader" and self.leader_frozen)
        }
        transfers = {}
        for transfer in self.transfers:
            student, teacher = logits[transfer.student], logits[transfer.teacher].detach()
            transfers[str(transfer)] = transfer.kind(student, teacher, target)
        return LossTerms(labels, transfers)

    def ramp(self, progress: float) -> float:
        """Returns the factor of all transfers, 0 to 1.

        Args:
            progress: Share of the training that is done, this step included.
        """
        share = self.cooperation.ramp
        return min(1.0, progress / share) if share else 1.0

    def total(self, terms: LossTerms, progress: float = 1.0) -> Tensor:
        """Sums the weighted terms up.

        Args:
            terms: As `terms` returns them.
            progress: Share of the training that is done, this step included.

        Returns:
            The loss, a scalar.
        """
        total = torch.stack(list(terms.labels.values())).sum()
        if not self.transfers:
            return total
        weighted = [transfer.weight * terms.transfers[str(transfer)] for transfer in self.transfers]
        return total + self.ramp(progress) * torch.stack(weighted).sum()

    def forward(
        self, logits: Mapping[str, Tensor], target: Tensor, progress: float = 1.0
    ) -> Tensor:
        """Computes the loss of one batch.

        Args:
            logits: By the member's name, each ``(N, classes)``.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.
            progress: Share of the training that is done, this step included: transfers grow with
                it, see `Cooperation.ramp`.

        Returns:
            The loss, a scalar.
        """
        return self.total(self.terms(logits, target), progress)

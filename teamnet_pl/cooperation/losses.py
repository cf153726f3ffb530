"""The loss of a team: labels and transfers, from a mapping of logits to a scalar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor, nn

from teamnet_pl.cooperation.members import ENSEMBLE, LEADER, at_least_single
from teamnet_pl.cooperation.transfers import (
    Cooperation,
    progress_since,
    ramp_factor,
)
from teamnet_pl.errors import TeamNetError

_LEAST_LABEL_WEIGHT = 0.1


@dataclass(frozen=True)
class LossTerms:
    """Every term of the loss of one batch, unweighted, as scalars.

    Attributes:
        labels: Label loss by the member's name.
        transfers: Loss of each transfer by its name, such as ``leader->a/d7``.
        features: Loss of the features of each transfer, by its name.
    """

    labels: Mapping[str, Tensor]
    transfers: Mapping[str, Tensor]
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Returns all terms by the names that they are logged under.

        Returns:
            ``ce/<member>`` for each label loss, ``kd/<teacher>_to_<student>`` for each transfer and
            ``features/<teacher>_to_<student>`` for its features.
        """
        groups = {"ce": self.labels, "kd": self.transfers, "features": self.features}
        return {
            logged_name(group, name): term
            for group, terms in groups.items()
            for name, term in terms.items()
        }


def logged_name(group: str, name: str) -> str:
    """Returns the name that a term is logged under, of signs that every logger takes.

    Args:
        group: Such as ``kd``.
        name: Name of a member or of a transfer.
    """
    return f"{group}/{name.replace('->', '_to_')}"


class CooperativeLoss(nn.Module):
    """The sum of every member's label loss and of every transfer, weighted.

    It needs no Lightning, and no net: logits by the member's name are its input. Terms are those of
    the members that are there: a step may leave out some depths, or all but the Leader.

    Args:
        teammates: Each Teammate's depths or their names, the deepest first.
        cooperation: The transfers, and the weights of labels and members.
        leader: Whether there is a Leader.
        leader_alone: Share of the training in which the Leader alone is trained; transfers grow
            from then on.
        leader_finish: Share of the training after which the Leader only teaches; 0 for a frozen
            one, which learns nothing at all.
        label_smoothing: Share of the label spread over all classes, from 0 to 1.

    Attributes:
        transfers: The transfers between the members.

    Raises:
        TeamNetError: If the label smoothing is out of range, a transfer does not fit the members,
            or nothing teaches a depth.

    Examples:
        >>> from teamnet_pl.cooperation import TeacherEdge
        >>> cooperation = Cooperation(leader=TeacherEdge(0.9, students="deepest"))
        >>> criterion = CooperativeLoss({"a": ["d2", "d0"]}, cooperation, leader=True)
        >>> [str(transfer) for transfer in criterion.transfers]
        ['leader->a/d2']
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
        leader_alone: float = 0.0,
        leader_finish: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise TeamNetError(f"label_smoothing must be in [0, 1), found {label_smoothing}.")
        self.cooperation = Cooperation() if cooperation is None else cooperation
        transfers = self.cooperation.transfers(teammates, leader)
        # A Leader that is never trained learns from nobody.
        self.transfers = tuple(
            transfer for transfer in transfers if transfer.student != LEADER or leader_finish > 0
        )
        self._check_every_member_learns(teammates, leader_learns=leader and leader_finish > 0)
        self.leader_alone = leader_alone if leader else 0.0
        self.leader_finish = leader_finish
        self.label_smoothing = label_smoothing
        self._deepest = [f"{name}/{depths[0]}" for name, depths in teammates.items()]

    def _check_every_member_learns(
        self, teammates: Mapping[str, Sequence[object]], leader_learns: bool
    ) -> None:
        labels = self.cooperation.labels
        students = {transfer.student for transfer in self.transfers}
        if leader_learns and labels.leader == 0 and LEADER not in students:
            raise TeamNetError(
                "Nothing teaches the Leader: give its labels a weight, or freeze it "
                "(leader.frozen true)."
            )
        for name, depths in teammates.items():
            for index, depth in enumerate(depths):
                weight = labels.others if index else labels.deepest
                if weight == 0 and f"{name}/{depth}" not in students:
                    raise TeamNetError(
                        f"Nothing teaches {name}/{depth}: the weight of its labels is 0, and no "
                        "transfer with a weight has it as its student."
                    )

    def is_trained(self, member: str, progress: float) -> bool:
        """Says whether a member learns in a step.

        Args:
            member: Name of the member.
            progress: Share of the training that is done, this step included.
        """
        return member != LEADER or progress <= self.leader_finish

    def terms(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        progress: float = 1.0,
        teachers: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> LossTerms:
        """Computes every term of the loss that has a weight, unweighted.

        Args:
            logits: By the member's name, each ``(N, classes)``.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.
            progress: Share of the training that is done, this step included.
            teachers: Logits of teachers that teach in place of the members of these names.
            features: By the member's name and the module's, each ``(N, ...)``.
        """
        labels = {
            member: F.cross_entropy(values, target, label_smoothing=self.label_smoothing)
            for member, values in logits.items()
            if self.is_trained(member, progress) and self._label_weight(member, progress) > 0
        }
        teaching = {
            name: values.detach() for name, values in {**logits, **(teachers or {})}.items()
        }
        if any(transfer.teacher == ENSEMBLE for transfer in self.transfers):
            averaged = [teaching[name] for name in (LEADER, *self._deepest) if name in teaching]
            teaching[ENSEMBLE] = weighted_average(averaged, target)
        transfers = {
            str(transfer): transfer.kind(
                logits[transfer.student], teaching[transfer.teacher], target
            )
            for transfer in self.transfers
            if transfer.student in logits
            and transfer.teacher in teaching
            and self.is_trained(transfer.student, progress)
        }
        return LossTerms(labels, transfers, self._feature_terms(transfers, features or {}))

    def _feature_terms(
        self, transfers: Mapping[str, Tensor], features: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        terms = {}
        for transfer in self.transfers:
            taught = features.get(transfer.student, {})
            teaching = features.get(transfer.teacher, {})
            errors = [
                feature_loss(taught[module], teaching[module])
                for module in taught
                if module in teaching and taught[module].shape == teaching[module].shape
            ]
            if errors and str(transfer) in transfers:
                terms[str(transfer)] = torch.stack(errors).mean()
        return terms

    def _label_weight(self, member: str, progress: float) -> float:
        labels = self.cooperation.labels
        if member == LEADER:
            weight = labels.leader
        else:
            weight = labels.deepest if member in self._deepest else labels.others
        if weight is not None:
            return weight
        taken = sum(
            transfer.weight * self._grown(transfer.ramp, progress)
            for transfer in self.transfers
            if transfer.student == member
        )
        return max(_LEAST_LABEL_WEIGHT, 1 - taken)

    def _grown(self, ramp: float, progress: float) -> float:
        return ramp_factor(ramp, progress_since(self.leader_alone, progress))

    def ramps(self, progress: float) -> dict[str, float]:
        """Returns the factor of each group of transfers that has a weight, 0 to 1.

        Args:
            progress: Share of the training that is done, this step included.
        """
        return {
            name: self._grown(edge.ramp, progress)
            for name, edge in self.cooperation.edges().items()
            if edge.weight > 0
        }

    def total(self, terms: LossTerms, progress: float = 1.0) -> Tensor:
        """Sums the weighted terms up.

        Args:
            terms: As `terms` returns them.
            progress: Share of the training that is done, this step included.

        Returns:
            The loss, a scalar.

        Raises:
            TeamNetError: If no term has a weight.
        """
        factors = self.cooperation.member_weights
        weighted = [
            factors.get(member, 1.0) * self._label_weight(member, progress) * term
            for member, term in terms.labels.items()
        ]
        weighted += [
            factors.get(transfer.student, 1.0)
            * self._grown(transfer.ramp, progress)
            * transfer.weight
            * terms.transfers[str(transfer)]
            for transfer in self.transfers
            if str(transfer) in terms.transfers
        ]
        weighted += [
            factors.get(transfer.student, 1.0)
            * self._grown(transfer.ramp, progress)
            * self.cooperation.features.weight
            * terms.features[str(transfer)]
            for transfer in self.transfers
            if str(transfer) in terms.features
        ]
        if not weighted:
            raise TeamNetError(
                "No term of the loss has a weight in this step: give labels or transfers one."
            )
        return torch.stack(weighted).sum()

    def forward(
        self, logits: Mapping[str, Tensor], target: Tensor, progress: float = 1.0
    ) -> Tensor:
        """Computes the loss of one batch.

        Args:
            logits: By the member's name, each ``(N, classes)``.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.
            progress: Share of the training that is done, this step included: weights change with
                it, see `Cooperation`.

        Returns:
            The loss, a scalar.
        """
        return self.total(self.terms(logits, target, progress), progress)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared error of features, relative to the teacher's mean square.

    Args:
        student: Shape ``(N, ...)``.
        teacher: Of the same shape; no gradient flows into them.

    Returns:
        The mean over the batch, a scalar.

    Examples:
        >>> feature_loss(torch.zeros(2, 3), torch.full((2, 3), 5.0))
        tensor(1.)
    """
    student, teacher = at_least_single(student), at_least_single(teacher.detach())
    scale = teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)
    return F.mse_loss(student, teacher) / scale


def weighted_average(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Averages the predictions of several nets, each by the probability it gives to the label.

    Args:
        logits: Of each net, shape ``(N, classes)``.
        target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, classes)``.

    Returns:
        Logarithms of the averaged probabilities, shape ``(N, classes)``.

    Source: the weights of each image follow Zhang et al., "Confidence-Aware Multi-Teacher Knowledge
    Distillation" (arXiv 2201.00007), which has another function of the same cross-entropies.

    Examples:
        >>> right, wrong = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
        >>> weighted_average([right, wrong], torch.tensor([0])).softmax(dim=-1).argmax().item()
        0
    """
    stacked = torch.stack(list(logits)).log_softmax(dim=-1)
    fits = torch.stack([-F.cross_entropy(values, target, reduction="none") for values in stacked])
    return torch.logsumexp(stacked + fits.log_softmax(dim=0).unsqueeze(-1), dim=0)

"""Transfers: which net teaches which, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from torch import Tensor

from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class Edge:
    """How strongly one kind of teacher teaches.

    Attributes:
        weight: Factor of the distillation loss; 0 leaves the transfer out.
        temperature: By which logits are divided, of the teacher and of the student.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise TeamNetError(f"A transfer's weight must not be negative, found {self.weight}.")
        if self.temperature <= 0:
            raise TeamNetError(f"A transfer's temperature must be > 0, found {self.temperature}.")


@dataclass(frozen=True)
class Transfer(Edge):
    """One distillation edge of a team.

    Attributes:
        teacher: Name of a member, such as ``leader`` or ``a/d12``; ``a`` is its deepest depth.
        student: Name of a member of a Teammate, such as ``a/d9``.
    """

    teacher: str = ""
    student: str = ""

    def __str__(self) -> str:
        return f"{self.teacher}->{self.student}"


@dataclass(frozen=True)
class Cooperation:
    """The transfers of a team.

    Attributes:
        leader: From the Leader to each Teammate's deepest depth.
        peer: From each Teammate's deepest depth to the other's.
        depths: From each Teammate's deepest depth to each of its other depths.
        further: Any others, by name.
        ramp: Share of the training over which all transfers grow from nothing to their weight:
            teachers know nothing at first.
    """

    leader: Edge = field(default_factory=Edge)
    peer: Edge = field(default_factory=Edge)
    depths: Edge = field(default_factory=Edge)
    further: list[Transfer] = field(default_factory=list)
    ramp: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 <= self.ramp <= 1:
            raise TeamNetError(f"The ramp is a share of the training, 0 to 1; found {self.ramp}.")

    def transfers(
        self, teammates: dict[str, Sequence[str]], has_leader: bool
    ) -> tuple[Transfer, ...]:
        """Lists the transfers of one team.

        Args:
            teammates: Names of each Teammate's depths, the deepest first.
            has_leader: Whether there is a Leader.

        Returns:
            The transfers with a weight, each between two members.

        Raises:
            ValueError: If a further transfer names a member that there is not, teaches the Leader
                or has a member teach itself.

        Example:
            >>> for transfer in Cooperation().transfers({"a": ["d2", "d0"], "b": ["d2"]}, True):
            ...     print(transfer)
            leader->a/d2
            leader->b/d2
            b/d2->a/d2
            a/d2->b/d2
            a/d2->a/d0
        """
        deepest = {name: f"{name}/{depths[0]}" for name, depths in teammates.items()}
        members = {f"{name}/{depth}" for name, depths in teammates.items() for depth in depths}
        teachers = members | ({"leader"} if has_leader else set())

        found = []
        if has_leader:
            found += [_transfer(self.leader, "leader", student) for student in deepest.values()]
        for student in deepest.values():
            others = (teacher for teacher in deepest.values() if teacher != student)
            found += [_transfer(self.peer, teacher, student) for teacher in others]
        for name, depths in teammates.items():
            found += [_transfer(self.depths, deepest[name], f"{name}/{d}") for d in depths[1:]]
        for own in self.further:
            teacher = deepest.get(own.teacher, own.teacher)
            student = deepest.get(own.student, own.student)
            if teacher not in teachers or student not in members or teacher == student:
                raise TeamNetError(
                    f"There is no transfer {own}: a teacher is one of {', '.join(sorted(teachers))}"
                    f" and a student another of {', '.join(sorted(members))}."
                )
            found.append(_transfer(own, teacher, student))
        return tuple(transfer for transfer in found if transfer.weight > 0)


def _transfer(edge: Edge, teacher: str, student: str) -> Transfer:
    return Transfer(edge.weight, edge.temperature, teacher, student)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened predictions, times the temperature squared.

    Args:
        student: Logits, shape ``(N, classes)``.
        teacher: Logits, shape ``(N, classes)``; no gradient flows into them.
        temperature: By which both are divided.

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

"""Transfers: which net teaches which, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from teamnet_pl.cooperation.kinds import KLDivergence, TransferKind
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class Edge:
    """How a group of transfers teaches.

    Attributes:
        weight: Factor of the transfer's loss; 0 leaves the transfer out.
        kind: The transfer's loss, by its class path and options.
    """

    weight: float = 0.5
    kind: TransferKind = field(default_factory=KLDivergence)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise TeamNetError(f"A transfer's weight must not be negative, found {self.weight}.")


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
        peer: From each Teammate's deepest depth to that of each other Teammate.
        sub_networks: From each Teammate's deepest depth to each of its own shallower depths.
        extra: Any others, by name.
        ramp: Share of the training over which all transfers grow from nothing to their weight,
            since teachers know nothing at first.
    """

    leader: Edge = field(default_factory=Edge)
    peer: Edge = field(default_factory=Edge)
    sub_networks: Edge = field(default_factory=Edge)
    extra: list[Transfer] = field(default_factory=list)
    ramp: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 <= self.ramp <= 1:
            raise TeamNetError(f"The ramp is a share of the training, 0 to 1; found {self.ramp}.")

    def transfers(
        self, teammates: Mapping[str, Sequence[object]], has_leader: bool
    ) -> tuple[Transfer, ...]:
        """Lists the transfers of one team.

        Args:
            teammates: Each Teammate's depths or their names, the deepest first.
            has_leader: Whether there is a Leader.

        Returns:
            The transfers with a weight, each between two members.

        Raises:
            TeamNetError: If an extra transfer names an unknown member, teaches the Leader, has a
                member teach itself or repeats another transfer.

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
        transfers: list[Transfer] = []
        if has_leader:
            transfers += _between(self.leader, ["leader"], deepest.values())
        for student in deepest.values():
            transfers += _between(self.peer, deepest.values(), [student])
        for name, depths in teammates.items():
            transfers += _between(
                self.sub_networks, [deepest[name]], [f"{name}/{depth}" for depth in depths[1:]]
            )
        students = {f"{name}/{depth}" for name, depths in teammates.items() for depth in depths}
        teachers = students | ({"leader"} if has_leader else set())
        for extra in self.extra:
            teacher = deepest.get(extra.teacher, extra.teacher)
            student = deepest.get(extra.student, extra.student)
            if teacher not in teachers or student not in students or teacher == student:
                raise TeamNetError(
                    f"There is no transfer {extra}: the teacher must be one of "
                    f"{', '.join(sorted(teachers))}, and the student another one of "
                    f"{', '.join(sorted(students))}."
                )
            transfers += _between(extra, [teacher], [student])
        transfers = [transfer for transfer in transfers if transfer.weight > 0]
        name, times = Counter(map(str, transfers)).most_common(1)[0] if transfers else ("", 0)
        if times > 1:
            raise TeamNetError(
                f"There are {times} transfers {name}: set the weight of all but one to 0, or "
                "combine their losses in a kind of your own."
            )
        return tuple(transfers)

    def describe(self) -> dict[str, Any]:
        """Returns the fields as plain values, each kind by its class path."""
        values = asdict(self)
        for name in ("leader", "peer", "sub_networks"):
            values[name]["kind"] = getattr(self, name).kind.describe()
        for plain, transfer in zip(values["extra"], self.extra, strict=True):
            plain["kind"] = transfer.kind.describe()
        return values


def _between(edge: Edge, teachers: Iterable[str], students: Iterable[str]) -> list[Transfer]:
    """One transfer from each teacher to each student other than itself."""
    return [
        Transfer(edge.weight, edge.kind, teacher, student)
        for teacher in teachers
        for student in students
        if teacher != student
    ]

"""Transfers: which net teaches which, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from teamnet_pl.cooperation.kinds import KLDivergence, TransferKind
from teamnet_pl.cooperation.members import ENSEMBLE, LEADER
from teamnet_pl.errors import TeamNetError

Students = Literal["all", "deepest"]
"""The depths of a Teammate that a transfer teaches."""


def ramp_factor(share: float, progress: float) -> float:
    """Returns the factor of a loss that grows linearly over the first share of the training.

    Args:
        share: 0 to 1; 0 for a loss with its whole weight from the start.
        progress: Share of the training that is done, this step included.

    Examples:
        >>> ramp_factor(0.5, 0.25)
        0.5
    """
    return min(1.0, progress / share) if share else 1.0


def progress_since(start: float, progress: float) -> float:
    """Converts the progress of a training to that of its part from a share of it on, at least 0.

    Examples:
        >>> progress_since(0.5, 0.75)
        0.5
    """
    return max(0.0, (progress - start) / (1 - start))


def _check_ramp(ramp: float) -> None:
    if not 0 <= ramp <= 1:
        raise TeamNetError(f"The ramp is a share of the training, 0 to 1; found {ramp}.")


@dataclass(frozen=True)
class Edge:
    """How a group of transfers teaches.

    Attributes:
        weight: Factor of the transfer's loss; 0 leaves the transfer out.
        kind: The transfer's loss, by its class path and options.
        ramp: Share of the Teammates' training over which the loss grows from nothing to its weight,
            since teachers that are in training themselves know nothing at first.
    """

    weight: float
    kind: TransferKind = field(default_factory=lambda: KLDivergence(temperature=4.0))
    ramp: float = 1 / 3

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise TeamNetError(f"A transfer's weight must not be negative, found {self.weight}.")
        _check_ramp(self.ramp)


@dataclass(frozen=True)
class Transfer(Edge):
    """One distillation edge of a team.

    Attributes:
        teacher: Name of a member, such as ``leader`` or ``a/d12``, or ``ensemble``; ``a`` is its
            deepest depth.
        student: Name of a member, such as ``a/d9``.
    """

    teacher: str = ""
    student: str = ""

    def __str__(self) -> str:
        return f"{self.teacher}->{self.student}"


@dataclass(frozen=True)
class TeacherEdge(Edge):
    """How one teacher teaches the Teammates.

    Attributes:
        students: Whether it teaches all depths or the deepest alone.
    """

    students: Students = "all"


@dataclass(frozen=True)
class PeerEdge(TeacherEdge):
    """How a Teammate teaches the others.

    Attributes:
        teachers: Its deepest depth, or for each student the nearest depth that keeps at least as
            many blocks.
    """

    teachers: Literal["deepest", "nearest"] = "deepest"


@dataclass(frozen=True)
class SubNetworkEdge(Edge):
    """How the depths of a Teammate teach each other.

    Attributes:
        teachers: For each shallower depth the deepest, or the next deeper one; or all other depths
            for each depth.
    """

    teachers: Literal["deepest", "next", "others"] = "deepest"


@dataclass(frozen=True)
class FeatureEdge:
    """How transfers teach features besides logits.

    Each transfer from one net to another teaches the features of these modules, too, where both
    nets have a module of that name whose features have the same shape. Its loss is the mean squared
    error divided by the mean square of the teacher's features.

    Attributes:
        weight: Factor of the loss, which also grows by the ramp of the transfer.
        modules: Names of modules in the backbones, with wildcards, such as ``layer?``.

    Source: Romero et al., "FitNets" (arXiv 1412.6550), without its regressor.
    """

    weight: float = 0.0
    modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise TeamNetError(f"The weight of features must not be negative, found {self.weight}.")
        if self.weight and not self.modules:
            raise TeamNetError("Features with a weight need the names of modules, such as layer3.")


@dataclass(frozen=True)
class LabelWeights:
    """Weights of the label losses.

    A weight of None is the rest: 1 minus the weights of the transfers to the member as they have
    grown so far, and at least 0.1. Labels are then the only teacher as long as the others know
    nothing, and the weights of all that teaches a member sum up to 1.

    Attributes:
        deepest: Of a Teammate's deepest depth.
        others: Of each of its other depths.
        leader: Of the Leader.
    """

    deepest: float | None = None
    others: float | None = None
    leader: float | None = None

    def __post_init__(self) -> None:
        for name in ("deepest", "others", "leader"):
            if (weight := getattr(self, name)) is not None and weight < 0:
                raise TeamNetError(f"The label weight {name} must not be negative, found {weight}.")


@dataclass(frozen=True)
class Cooperation:
    """The transfers of a team, and the weights of its losses.

    Attributes:
        leader: From the Leader to the Teammates.
        peer: From each Teammate to each other Teammate.
        sub_networks: Between the depths of each Teammate.
        ensemble: From the average of the Leader and of the Teammates' deepest depths to the
            Teammates. In the average, the prediction for an image counts by the probability that it
            gives to the label, so that strong teachers are not diluted by weak ones.
        to_leader: From each Teammate's deepest depth to the Leader, as long as it is trained.
        extra: Any others, by name.
        features: Features that the transfers teach besides logits.
        labels: Weights of the label losses.
        member_weights: Factors of all losses of single members, by name, such as ``a/d3: 2.0``.
        averaged_teachers: Decay of moving averages of the Leader and of the Teammates, such as
            0.999, which teach in their place; 0 for none.
    """

    leader: TeacherEdge = field(default_factory=lambda: TeacherEdge(0.5))
    peer: PeerEdge = field(default_factory=lambda: PeerEdge(0.0))
    sub_networks: SubNetworkEdge = field(default_factory=lambda: SubNetworkEdge(0.0))
    ensemble: TeacherEdge = field(default_factory=lambda: TeacherEdge(0.0))
    to_leader: Edge = field(default_factory=lambda: Edge(0.0))
    extra: list[Transfer] = field(default_factory=list)
    features: FeatureEdge = field(default_factory=FeatureEdge)
    labels: LabelWeights = field(default_factory=LabelWeights)
    member_weights: dict[str, float] = field(default_factory=dict)
    averaged_teachers: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.member_weights.items():
            if weight < 0:
                raise TeamNetError(
                    f"member_weights: the factor of {name} must not be negative, found {weight}."
                )

        if not 0 <= self.averaged_teachers < 1:
            raise TeamNetError(
                f"averaged_teachers is a decay in [0, 1), found {self.averaged_teachers}."
            )

    def edges(self) -> dict[str, Edge]:
        """Returns the groups of transfers by the names of their fields."""
        edges = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: edge for name, edge in edges.items() if isinstance(edge, Edge)}

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
            TeamNetError: If an extra transfer or a factor names an unknown member, a transfer has a
                member teach itself or repeats another one.

        Examples:
            >>> cooperation = Cooperation(leader=TeacherEdge(0.9), peer=PeerEdge(0.1))
            >>> for transfer in cooperation.transfers({"a": ["d2", "d0"], "b": ["d2"]}, True):
            ...     print(transfer)
            leader->a/d2
            leader->a/d0
            leader->b/d2
            b/d2->a/d2
            b/d2->a/d0
            a/d2->b/d2
        """
        members = {
            name: [f"{name}/{depth}" for depth in depths] for name, depths in teammates.items()
        }
        deepest = {name: depths[0] for name, depths in members.items()}
        transfers: list[Transfer] = []
        for depths in members.values() if has_leader else ():
            transfers += _taught_by(LEADER, depths, self.leader)
        for name, depths in members.items():
            for peer, peer_depths in members.items():
                if peer != name:
                    transfers += _between_peers(peer_depths, depths, self.peer)
        for depths in members.values():
            transfers += _within_teammate(depths, self.sub_networks)
        for depths in members.values():
            transfers += _taught_by(ENSEMBLE, depths, self.ensemble)
        if has_leader:
            transfers += [_transfer(self.to_leader, each, LEADER) for each in deepest.values()]
        students = {member for depths in members.values() for member in depths}
        students |= {LEADER} if has_leader else set()
        transfers += self._extra_transfers(deepest, students)
        transfers = [transfer for transfer in transfers if transfer.weight > 0]
        name, times = Counter(map(str, transfers)).most_common(1)[0] if transfers else ("", 0)
        if times > 1:
            raise TeamNetError(
                f"There are {times} transfers {name}: set the weight of all but one to 0, or "
                "combine their losses in a kind of your own."
            )
        self._check_member_weights(students)
        return tuple(transfers)

    def _extra_transfers(self, deepest: Mapping[str, str], students: set[str]) -> list[Transfer]:
        """The extra transfers, a Teammate's name standing for its deepest depth."""
        teachers = students | {ENSEMBLE}
        transfers = []
        for extra in self.extra:
            teacher = deepest.get(extra.teacher, extra.teacher)
            student = deepest.get(extra.student, extra.student)
            if teacher not in teachers or student not in students or teacher == student:
                raise TeamNetError(
                    f"There is no transfer {extra}: the teacher must be one of "
                    f"{', '.join(sorted(teachers))}, and the student another one of "
                    f"{', '.join(sorted(students))}."
                )
            transfers.append(_transfer(extra, teacher, student))
        return transfers

    def _check_member_weights(self, members: set[str]) -> None:
        if unknown := self.member_weights.keys() - members:
            raise TeamNetError(
                f"member_weights: there is no member {', '.join(sorted(unknown))}; the members are "
                f"{', '.join(sorted(members))}."
            )

    def describe(self) -> dict[str, Any]:
        """Returns the fields as plain values, each kind by its class path."""
        values = asdict(self)
        for name, edge in self.edges().items():
            values[name]["kind"] = edge.kind.describe()
        for plain, transfer in zip(values["extra"], self.extra, strict=True):
            plain["kind"] = transfer.kind.describe()
        return values


def _transfer(edge: Edge, teacher: str, student: str) -> Transfer:
    return Transfer(edge.weight, edge.kind, edge.ramp, teacher, student)


def _taught_by(teacher: str, depths: Sequence[str], edge: TeacherEdge) -> list[Transfer]:
    """The transfers from one teacher to the depths of a Teammate."""
    return [_transfer(edge, teacher, student) for student in _students(depths, edge)]


def _students(depths: Sequence[str], edge: TeacherEdge) -> Sequence[str]:
    return depths if edge.students == "all" else depths[:1]


def _between_peers(
    teachers: Sequence[str], depths: Sequence[str], edge: PeerEdge
) -> list[Transfer]:
    """The transfers from the depths of one Teammate to those of another."""

    def teacher_of(student: str) -> str:
        blocks = [_num_blocks(teacher) for teacher in teachers]
        as_deep = sum(count >= _num_blocks(student) for count in blocks)
        return teachers[max(0, as_deep - 1)]

    return [
        _transfer(edge, teachers[0] if edge.teachers == "deepest" else teacher_of(student), student)
        for student in _students(depths, edge)
    ]


def _num_blocks(member: str) -> int:
    return int(member.rpartition("/d")[2])


def _within_teammate(depths: Sequence[str], edge: SubNetworkEdge) -> list[Transfer]:
    """The transfers between the depths of one Teammate."""
    if edge.teachers == "others":
        pairs = [(teacher, student) for student in depths for teacher in depths]
        pairs = [(teacher, student) for teacher, student in pairs if teacher != student]
    elif edge.teachers == "next":
        pairs = list(pairwise(depths))
    else:
        pairs = [(depths[0], student) for student in depths[1:]]
    return [_transfer(edge, teacher, student) for teacher, student in pairs]

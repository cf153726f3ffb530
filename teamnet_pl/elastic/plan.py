"""The plan of a packed forward: many depths of a net in one pass over a batch of streams.

The batch axis carries streams, one for each distinct prefix of blocks so far, the deepest first.
The depths that run a block are always the first ones, so a block runs on the first rows of its
batch and the other rows bypass it. Where some depths of one stream run a block and others skip it,
the stream forks: its rows do both.

Where the features of a net branch around a block, or the net remembers their batch size, all
branches must have the same streams. Then the streams fork earlier: where the net enters a module
around the block, or at the latest where the net itself begins.

Everything here is plain data, fixed before the first forward. Streams are those of all depths; a
pass of some depths has the streams that carry one of them. What a layer does with the rows that
arrive depends on nothing but their number and these depths, so there is no state to carry from one
layer to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from teamnet_pl.elastic.depths import Depth
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class Block:
    """A sub-module that can be skipped.

    Attributes:
        name: Its name in the backbone, such as ``layer3.1``.
        stage: Index of its stage: consecutive blocks of one parent and one feature-map shape.
        passthrough: The arguments that replace its output where it is skipped: 0 for the first one,
            k for a tuple of the first k.
    """

    name: str
    stage: int
    passthrough: int = 0


def pass_through(passthrough: int, args: tuple[Any, ...]) -> Any:
    """Returns the arguments that replace the output of a skipped call, see `Block`."""
    return args[:passthrough] if passthrough else args[0]


@dataclass(frozen=True)
class Trace:
    """The part of one forward pass of a backbone that its depths depend on.

    Attributes:
        blocks: Skippable blocks, in the order in which they run.
        coupling: Names of the layers that couple the samples of a batch, such as batch norms.
        order: The calls of those layers, of the blocks and of the modules around the blocks, in
            training: the name and whether the call begins (True) or ends. The backbone itself is
            "".
        has_batch_axis: By the name of a block or a module around blocks: for each leaf of its
            arguments, whether it has a batch axis.
        returns_logits: Whether the backbone returns logits alone, in training and evaluation.
    """

    blocks: tuple[Block, ...]
    coupling: tuple[str, ...]
    order: tuple[tuple[str, bool], ...]
    has_batch_axis: dict[str, tuple[bool, ...]]
    returns_logits: bool = True

    @property
    def stages(self) -> list[int]:
        """Number of skippable blocks in each stage."""
        return [
            sum(block.stage == stage for block in self.blocks)
            for stage in range(self.blocks[-1].stage + 1)
        ]


StreamAt: TypeAlias = tuple[int, ...]
"""For each depth that gets to a place in the net, the deepest first, the index of its stream."""


@dataclass(frozen=True)
class Expansion:
    """The streams at the entry of a module around blocks, where they fork early.

    Attributes:
        outside: The streams that arrive.
        inside: The streams inside the module.
    """

    outside: StreamAt
    inside: StreamAt


@dataclass(frozen=True)
class Plan:
    """The streams of a net, fixed by its depths.

    Attributes:
        arriving: By block, the streams that arrive at it.
        expansions: By module around blocks, where the streams fork earlier than at a block.
        coupled: By layer that couples samples, the streams that it runs.
    """

    arriving: dict[str, StreamAt] = field(default_factory=dict)
    expansions: dict[str, Expansion] = field(default_factory=dict)
    coupled: dict[str, StreamAt] = field(default_factory=dict)


def num_fork_levels(trace: Trace) -> int:
    """Number of levels at which the streams of a net may fork, see `plan_streams`."""
    blocks = {block.name for block in trace.blocks}
    return max(map(len, _modules_around(trace, blocks).values()))


def plan_streams(depths: Sequence[Depth], trace: Trace, level: int = 0) -> Plan:
    """Plans the streams of nested depths.

    Args:
        depths: The depths, the deepest first.
        trace: The modules that run, and their order.
        level: How many modules out from a block its streams fork: 0 at the block itself.

    Raises:
        TeamNetError: If a layer that couples samples runs in places with different streams.
    """
    planner = _Planner(depths, trace, level)
    for name, begins in trace.order:
        if begins:
            planner.enter(name)
        else:
            planner.leave(name)
    return planner.plan


class _Planner:
    """Follows the streams through the calls of one forward pass and writes the plan."""

    def __init__(self, depths: Sequence[Depth], trace: Trace, level: int) -> None:
        self.plan = Plan()
        self._coupling = trace.coupling
        # The depths that run a block are the first ones, so their number names them.
        self._num_depths_running = {
            block.name: sum(depth.kept[index] for depth in depths)
            for index, block in enumerate(trace.blocks)
        }
        self._fork_points = _fork_points(trace, self._num_depths_running, level)
        self._streams: StreamAt = (0,) * len(depths)
        self._block: str | None = None
        """The block that the pass is in."""
        self._streams_after_block = self._streams

    def enter(self, name: str) -> None:
        """Plans a call that begins."""
        arriving, forked = self._streams, self._forked_at(name)
        if name in self._num_depths_running:
            self.plan.arriving[name] = arriving
            self._streams = arriving[: self._num_depths_running[name]]
            self._block, self._streams_after_block = name, forked
        elif forked != arriving:
            self.plan.expansions[name] = Expansion(arriving, forked)
            self._streams = forked
        if name in self._coupling:
            self._separate(name)

    def leave(self, name: str) -> None:
        """Plans a call that ends."""
        if name == self._block:
            self._streams, self._block = self._streams_after_block, None

    def _forked_at(self, name: str) -> StreamAt:
        """The streams once those that fork at a module have forked."""
        streams = self._streams
        for block, point in self._fork_points.items():
            if point == name:
                streams = _fork(streams, self._num_depths_running[block])
        return streams

    def _separate(self, layer: str) -> None:
        if self.plan.coupled.setdefault(layer, self._streams) != self._streams:
            raise TeamNetError(
                f"{layer} runs in several places, with different depths in each, so its running "
                "statistics cannot be kept. Give each place a layer of its own."
            )


def _fork(streams: StreamAt, num_running: int) -> StreamAt:
    """The streams once the first depths have no stream in common with the others."""
    running, others = streams[:num_running], streams[num_running:]
    forks = running[-1:] == others[:1]
    return running + tuple(stream + forks for stream in others)


def _fork_points(trace: Trace, blocks: Collection[str], level: int) -> dict[str, str]:
    """The module at which the streams of each block fork."""
    around = _modules_around(trace, blocks)
    return {name: modules[min(level, len(modules) - 1)] for name, modules in around.items()}


def _modules_around(trace: Trace, blocks: Collection[str]) -> dict[str, list[str]]:
    """Each block with itself and the modules around it that run once, the innermost first."""
    around: dict[str, list[str]] = {}
    running: list[str] = []
    begun = [name for name, begins in trace.order if begins]
    run_once = {name for name in begun if begun.count(name) == 1}
    for name, begins in trace.order:
        if not begins:
            running.pop()
            continue
        running.append(name)
        if name in blocks:
            around[name] = [module for module in reversed(running) if module in run_once]
    return around

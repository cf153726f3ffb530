"""The plan of a packed forward: all depths of a net in one pass over a batch of streams.

The batch axis carries streams, one for each distinct prefix of blocks so far, the deepest first.
The depths that run a block are always the first ones, so a block runs on the first rows of its
batch and the other rows bypass it. Where some depths of one stream run a block and others skip it,
the stream forks: its rows do both.

Where the features of a net branch around a block, or the net remembers their batch size, all
branches must have the same streams. Then the streams fork earlier: where the net enters a module
around the block, or at the latest where the net itself begins.

Everything here is plain data, fixed before the first forward. What a layer does with the rows that
arrive depends on nothing but their number, so there is no state to carry from one layer to the
next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """

    blocks: tuple[Block, ...]
    coupling: tuple[str, ...]
    order: tuple[tuple[str, bool], ...]
    has_batch_axis: dict[str, tuple[bool, ...]]

    @property
    def stages(self) -> list[int]:
        """Number of skippable blocks in each stage."""
        return [
            sum(block.stage == stage for block in self.blocks)
            for stage in range(self.blocks[-1].stage + 1)
        ]


@dataclass(frozen=True)
class Fork:
    """The way of the streams that arrive at a block.

    Attributes:
        num_streams: Number of streams that arrive.
        num_running: Number of streams, from the first, that run the block.
        bypass_start: Index of the first stream that (also) bypasses the block; ``num_streams`` if
            none does.
    """

    num_streams: int
    num_running: int
    bypass_start: int


@dataclass(frozen=True)
class Expansion:
    """The streams at the entry of a module around blocks, where they fork early.

    Attributes:
        num_streams: Number of streams that arrive.
        sources: For each stream inside the module, the index of the stream that it comes from.
    """

    num_streams: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Streams:
    """The streams at a layer.

    Attributes:
        starts: For each stream, the index of the deepest depth that it carries.
        num_depths: Number of depths, from the deepest, that run the layer.
    """

    starts: tuple[int, ...]
    num_depths: int

    @property
    def stream_at(self) -> tuple[int, ...]:
        """For each depth that runs the layer, the index of its stream."""
        return tuple(bisect_right(self.starts, depth) - 1 for depth in range(self.num_depths))


@dataclass(frozen=True)
class Plan:
    """The streams of a net, fixed by its depths.

    Attributes:
        forks: By block.
        expansions: By module around blocks, where the streams fork earlier than at a block.
        streams: By layer that couples samples.
    """

    forks: dict[str, Fork] = field(default_factory=dict)
    expansions: dict[str, Expansion] = field(default_factory=dict)
    streams: dict[str, Streams] = field(default_factory=dict)


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
    """Follows the streams through the calls of one forward pass and writes the plan.

    Streams are given as in `Streams.starts`.
    """

    def __init__(self, depths: Sequence[Depth], trace: Trace, level: int) -> None:
        self.plan = Plan()
        self._num_depths = len(depths)
        self._coupling = trace.coupling
        # The depths that run a block are the first ones, so their number names them.
        self._num_depths_running = {
            block.name: sum(depth.kept[index] for depth in depths)
            for index, block in enumerate(trace.blocks)
        }
        self._fork_points = _fork_points(trace, self._num_depths_running, level)
        self._streams: tuple[int, ...] = (0,)
        self._block: str | None = None
        """The block that the pass is in."""
        self._streams_after_block: tuple[int, ...] = self._streams

    def enter(self, name: str) -> None:
        """Plans a call that begins."""
        forked = self._forked_at(name)
        if name in self._num_depths_running:
            self._fork(name, forked)
        elif forked != self._streams:
            self._expand(name, forked)
        if name in self._coupling:
            self._separate(name)

    def leave(self, name: str) -> None:
        """Plans a call that ends."""
        if name == self._block:
            self._streams, self._block = self._streams_after_block, None

    def _forked_at(self, name: str) -> tuple[int, ...]:
        """The streams once those that fork at a module have forked."""
        starts = {
            self._num_depths_running[block]
            for block, point in self._fork_points.items()
            if point == name
        }
        return tuple(sorted({*self._streams, *starts} - {self._num_depths}))

    def _fork(self, block: str, forked: tuple[int, ...]) -> None:
        num_streams = len(self._streams)
        num_running = bisect_left(self._streams, self._num_depths_running[block])
        num_shared = len(forked) - num_streams
        self.plan.forks[block] = Fork(num_streams, num_running, num_running - num_shared)
        self._streams, self._block = self._streams[:num_running], block
        self._streams_after_block = forked

    def _expand(self, module: str, forked: tuple[int, ...]) -> None:
        sources = tuple(bisect_right(self._streams, start) - 1 for start in forked)
        self.plan.expansions[module] = Expansion(len(self._streams), sources)
        self._streams = forked

    def _separate(self, layer: str) -> None:
        num_depths = self._num_depths_running[self._block] if self._block else self._num_depths
        streams = Streams(self._streams, num_depths)
        if self.plan.streams.setdefault(layer, streams) != streams:
            raise TeamNetError(
                f"{layer} runs in several places, with different depths in each, so its running "
                "statistics cannot be kept. Give each place a layer of its own."
            )


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

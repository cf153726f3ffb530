"""The packed forward: all depths of a net in one pass over a batch of streams.

The batch axis carries streams, one for each distinct prefix of blocks so far, the deepest first.
The depths that run a block are always the first ones, so a block runs on the first rows of its
batch and the other rows pass by. Where some depths of one stream run a block and others skip it,
the stream forks: its rows do both.

All of this is fixed before the first forward. What a layer does with the rows that arrive depends
on nothing but their number, so there is no state to carry from one layer to the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teamnet_pl.elastic.depths import Depth


@dataclass
class Selection:
    """What the forwards of one net look at: the index of a depth, or None for all, packed."""

    depth: int | None = 0

    def __reduce__(self) -> tuple[type[Selection], tuple[()]]:
        """A copy is not within the scope that the original is in."""
        return Selection, ()


@dataclass(frozen=True)
class Fork:
    """What a block does with the streams that arrive.

    Attributes:
        arrive: Number of streams that arrive.
        run: Number of streams, from the first, that run the block.
        bypass: Index of the first stream that (also) passes by; ``arrive`` if none does.
    """

    arrive: int
    run: int
    bypass: int


@dataclass(frozen=True)
class Plan:
    """The streams of a net, fixed by its depths.

    Attributes:
        forks: One for each block, in the order in which they run.
        starts: For each number of blocks begun, the streams, each as the index of the deepest
            depth that it carries.
    """

    forks: tuple[Fork, ...]
    starts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, depths: Sequence[Depth]) -> Plan:
        """Plans the streams of nested depths, given the deepest first."""
        starts: list[tuple[int, ...]] = [(0,)]
        forks = []
        for block in range(len(depths[0].kept)):
            before = starts[-1]
            runs = sum(depth.kept[block] for depth in depths)
            after = tuple(sorted({*before, runs})) if runs < len(depths) else before
            run = bisect_left(before, runs)
            forks.append(Fork(len(before), run, run - len(after) + len(before)))
            starts.append(after)
        return cls(tuple(forks), tuple(starts))

    def streams(self, begun: int, inside: int | None) -> tuple[int, ...]:
        """Streams at a place in the net.

        Args:
            begun: Number of blocks begun before it.
            inside: Index of the block that it is inside of, if any.
        """
        if inside is None:
            return self.starts[begun]
        return self.starts[inside][: self.forks[inside].run]


class _Split(torch.autograd.Function):
    """The rows that run a block and the rows that pass by; they overlap where a stream forks.

    Two slices would do, but the gradient of each would be a zero-filled copy of the whole.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, run: int, bypass: int) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.bypass = run, bypass
        return features[:run], features[bypass:]

    @staticmethod
    def backward(ctx: Any, run: Tensor, passed: Tensor) -> tuple[Tensor, None, None]:
        shared = ctx.run - ctx.bypass
        if not shared:
            return torch.cat([run, passed]), None, None
        both = run[ctx.bypass :] + passed[:shared]
        return torch.cat([run[: ctx.bypass], both, passed[shared:]]), None, None


class SkippableForward:
    """Stands in for the ``forward`` of a block."""

    def __init__(
        self, module: nn.Module, selection: Selection, kept: tuple[bool, ...], fork: Fork
    ) -> None:
        self.module = module
        self.selection = selection
        self.kept = kept  # at each depth
        self.fork = fork

    def __call__(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block on the rows that run it, shape ``(rows, ...)`` in and out."""
        forward = type(self.module).forward
        depth, fork = self.selection.depth, self.fork
        if depth is not None:
            return forward(self.module, features, *args, **kwargs) if self.kept[depth] else features
        if fork.bypass == fork.arrive:
            return forward(self.module, features, *args, **kwargs)
        rows = len(features) // fork.arrive
        run, passed = _Split.apply(features, fork.run * rows, fork.bypass * rows)
        return torch.cat([forward(self.module, run, *args, **kwargs), passed])


class PerStreamForward:
    """Stands in for the ``forward`` of a batch norm: each stream is normalised alone.

    The layer itself is the first stream's, each further stream has a copy of it with running
    statistics of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        copies: nn.ModuleList,
        stream_at: tuple[int, ...],
    ) -> None:
        self.module = module
        self.selection = selection
        self.copies = copies
        self.stream_at = stream_at  # at each depth that runs the layer

    def __call__(self, features: Tensor) -> Any:
        """Normalises each stream's rows, shape ``(rows, channels, ...)`` in and out."""
        forward = type(self.module).forward
        depth = self.selection.depth
        if depth is not None:
            stream = self.stream_at[depth]
            return self.copies[stream - 1](features) if stream else forward(self.module, features)
        first, *others = features.chunk(len(self.copies) + 1)
        copied = [norm(rows) for norm, rows in zip(self.copies, others, strict=True)]
        return torch.cat([forward(self.module, first), *copied])

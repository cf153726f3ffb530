"""The packed forward: all depths of a net in one pass over a batch of streams.

The batch axis carries streams, one for each distinct prefix of blocks so far, the deepest first.
The depths that run a block are always the first ones, so a block runs on the first rows of its
batch and the other rows pass by. Where some depths of one stream run a block and others skip it,
the stream forks: its rows do both.

Where a net's features branch around a block, or it remembers their batch size, all of them must
have the same streams. Then the streams fork earlier, where the net enters a module around the
block, at the latest where it begins.

All of this is fixed before the first forward. What a layer does with the rows that arrive depends
on nothing but their number, so there is no state to carry from one layer to the next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from teamnet_pl.elastic.blocks import Trace
from teamnet_pl.elastic.depths import Depth
from teamnet_pl.elastic.probing import handed_on
from teamnet_pl.errors import TeamNetError


@dataclass
class Selection:
    """What the forwards of one net look at: the index of a depth, or None for all, packed."""

    depth: int | None = 0

    @contextmanager
    def at(self, depth: int | None) -> Iterator[None]:
        """Selects another for a while."""
        before = self.depth
        self.depth = depth
        try:
            yield
        finally:
            self.depth = before

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
class Expansion:
    """What a module around blocks does with the streams that arrive.

    Attributes:
        arrive: Number of streams that arrive.
        sources: For each stream inside of it, the index of the one that it comes from.
    """

    arrive: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Streams:
    """The streams at a layer.

    Attributes:
        starts: For each stream, the index of the deepest depth that it carries.
        depths: Number of depths, from the deepest, that run the layer.
    """

    starts: tuple[int, ...]
    depths: int


@dataclass(frozen=True)
class Plan:
    """The streams of a net, fixed by its depths.

    Attributes:
        forks: By block.
        expansions: By module around blocks, where the streams fork earlier than at a block.
        streams: By layer that mixes samples.
    """

    forks: dict[str, Fork] = field(default_factory=dict)
    expansions: dict[str, Expansion] = field(default_factory=dict)
    streams: dict[str, Streams] = field(default_factory=dict)

    @classmethod
    def of(cls, depths: Sequence[Depth], found: Trace, level: int = 0) -> Plan:
        """Plans the streams of nested depths.

        Args:
            depths: The deepest first.
            found: Which modules run, in which order.
            level: How many modules out from a block its streams fork: 0 at the block itself.

        Raises:
            ValueError: If a layer that mixes samples runs in places with different streams.
        """
        plan = cls()
        runs = {
            block.name: sum(depth.kept[index] for depth in depths)
            for index, block in enumerate(found.blocks)
        }
        points = _fork_points(found, runs, level)
        now: tuple[int, ...] = (0,)
        outside: tuple[int, ...] = now
        inside: str | None = None
        for name, begins in found.order:
            if name == inside and not begins:
                now, inside = outside, None
            if not begins:
                continue
            starts = {runs[block] for block, point in points.items() if point == name}
            after = tuple(sorted({*now, *starts} - {len(depths)}))
            if name in runs:
                run = bisect_left(now, runs[name])
                plan.forks[name] = Fork(len(now), run, run - len(after) + len(now))
                now, outside, inside = now[:run], after, name
            elif after != now:
                sources = tuple(bisect_right(now, start) - 1 for start in after)
                plan.expansions[name] = Expansion(len(now), sources)
                now = after
            if name in found.mixing:
                here = Streams(now, runs[inside] if inside else len(depths))
                if plan.streams.setdefault(name, here) != here:
                    raise TeamNetError(
                        f"{name} runs in several places, with different depths in each; its "
                        "running statistics cannot be kept. Give each place a layer of its own."
                    )
        return plan


def fork_levels(found: Trace) -> int:
    """Number of levels at which the streams of a net may fork, see `Plan.of`."""
    return max(map(len, _around(found, {block.name for block in found.blocks}).values()))


def _fork_points(found: Trace, blocks: Collection[str], level: int) -> dict[str, str]:
    """The module at which the streams of each block fork."""
    around = _around(found, blocks)
    return {name: modules[min(level, len(modules) - 1)] for name, modules in around.items()}


def _around(found: Trace, blocks: Collection[str]) -> dict[str, list[str]]:
    """Each block and the modules that run around it, the innermost first."""
    around: dict[str, list[str]] = {}
    begun: list[str] = []
    begins = [name for name, begin in found.order if begin]
    once = {name for name in begins if begins.count(name) == 1}
    for name, begin in found.order:
        if not begin:
            begun.pop()
            continue
        begun.append(name)
        if name in blocks:
            around[name] = [module for module in reversed(begun) if module in once]
    return around


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


class ElasticForward:
    """Stands in for the ``forward`` of a module.

    With gradient checkpointing the module runs again in the backward pass, at the same depths,
    which leaves its running statistics alone.
    """

    def __init__(
        self, module: nn.Module, selection: Selection, grad_checkpointing: bool = False
    ) -> None:
        self.module = module
        self.selection = selection
        self.grad_checkpointing = grad_checkpointing
        self.own = vars(module).get("forward")
        """One that the module had on the instance already."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module as the selection says."""
        return self.run(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module as it was."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module as it was, again in the backward pass if that is wanted."""
        if not (self.grad_checkpointing and self.module.training and torch.is_grad_enabled()):
            return self.plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(self.plain, *args, use_reentrant=False, **kwargs)
        depth = self.selection.depth

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.selection.at(depth):
                return self.plain(*args, **kwargs)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self._statistics_kept()

        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        buffers = list(self.module.buffers())
        for part in self.module.modules():
            forward = vars(part).get("forward")
            if isinstance(forward, PerStreamForward):
                buffers += forward.copies.buffers()
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, values in zip(buffers, before, strict=True):
                buffer.data.copy_(values)  # of which autograd takes no notice


class SkippableForward(ElasticForward):
    """The ``forward`` of a block: the rows of some streams run it, the others pass by."""

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        grad_checkpointing: bool,
        kept: tuple[bool, ...],
        fork: Fork,
        hands_on: int,
        batched: tuple[bool, ...],
    ) -> None:
        super().__init__(module, selection, grad_checkpointing)
        self.kept = kept  # at each depth
        self.fork = fork
        self.hands_on = hands_on
        self.batched = batched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block on the rows that run it; those rows and the others are returned."""
        depth, fork = self.selection.depth, self.fork
        if depth is not None:
            kept = self.kept[depth]
            return self.run(*args, **kwargs) if kept else handed_on(self.hands_on, args)
        if fork.bypass == fork.arrive:
            return self.run(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            run, passed = self._split(args[0])
            return torch.cat([self.run(run), passed])
        leaves, tree = _flatten(self, args, kwargs, self.batched)
        split = [
            self._split(leaf) if batched else (leaf, leaf)
            for leaf, batched in zip(leaves, self.batched, strict=True)
        ]
        (run_args, run_kwargs), (passed_args, _) = (
            tree_unflatten([pair[side] for pair in split], tree) for side in (0, 1)
        )
        outputs, tree = tree_flatten(self.run(*run_args, **run_kwargs))
        passed_on, _ = tree_flatten(handed_on(self.hands_on, passed_args))
        # What is handed on are the first leaves.
        joined = [
            torch.cat([a, b]) if batched else a
            for a, b, batched in zip(outputs, passed_on, self.batched, strict=False)
        ]
        return tree_unflatten(joined, tree)

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(features) // self.fork.arrive
        split: tuple[Tensor, Tensor] = _Split.apply(
            features, self.fork.run * rows, self.fork.bypass * rows
        )
        return split


class ExpandingForward(ElasticForward):
    """The ``forward`` of a module in which streams fork as they enter it."""

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        expansion: Expansion,
        batched: tuple[bool, ...],
    ) -> None:
        super().__init__(module, selection)
        self.expansion = expansion
        self.batched = batched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module on all streams that are inside of it."""
        if self.selection.depth is not None:
            return self.plain(*args, **kwargs)
        leaves, tree = _flatten(self, args, kwargs, self.batched)
        leaves = [
            self._expand(leaf) if batched else leaf
            for leaf, batched in zip(leaves, self.batched, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, tree)
        return self.plain(*args, **kwargs)

    def _expand(self, features: Tensor) -> Tensor:
        streams = features.chunk(self.expansion.arrive)
        return torch.cat([streams[source] for source in self.expansion.sources])


def _flatten(
    forward: ElasticForward, args: Any, kwargs: Any, batched: tuple[bool, ...]
) -> tuple[list[Any], Any]:
    leaves, tree = tree_flatten((args, kwargs))
    if len(leaves) != len(batched):
        raise TeamNetError(
            f"{type(forward.module).__name__} is called with {len(leaves)} values, but with "
            f"{len(batched)} when the net was made elastic. Call it alike each time."
        )
    return leaves, tree


class PerStreamForward(ElasticForward):
    """The ``forward`` of a layer that mixes samples, such as batch norm: each stream is run alone.

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
        super().__init__(module, selection)
        self.copies = copies
        self.stream_at = stream_at  # at each depth that runs the layer

    def __call__(self, features: Tensor) -> Any:
        """Runs each stream's rows, shape ``(rows, ...)`` in and out."""
        depth = self.selection.depth
        if depth is not None:
            stream = self.stream_at[depth]
            return self.copies[stream - 1](features) if stream else self.plain(features)
        first, *others = features.chunk(len(self.copies) + 1)
        copied = [layer(rows) for layer, rows in zip(self.copies, others, strict=True)]
        return torch.cat([self.plain(first), *copied])

"""The forwards that carry out a plan: each stands in for the ``forward`` of one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from teamnet_pl.elastic.plan import Expansion, StreamAt, pass_through
from teamnet_pl.errors import TeamNetError


@dataclass
class Selection:
    """The depths that all forwards of one net run, packed: their indices, the deepest first."""

    depths: tuple[int, ...] = (0,)

    @contextmanager
    def at(self, depths: tuple[int, ...]) -> Iterator[None]:
        """Selects other depths within a ``with`` block."""
        before = self.depths
        self.depths = depths
        try:
            yield
        finally:
            self.depths = before

    def __reduce__(self) -> tuple[type[Selection], tuple[()]]:
        """Leaves the depths out of a copy, which is not within the scope of the original."""
        return Selection, ()


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
        self.instance_forward = vars(module).get("forward")
        """A forward that was set on the module itself before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module at the selected depths."""
        return self.run(*args, **kwargs)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's original forward."""
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's original forward, with gradient checkpointing again in the backward."""
        if not (self.grad_checkpointing and self.module.training and torch.is_grad_enabled()):
            return self.run_original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(self.run_original, *args, use_reentrant=False, **kwargs)
        depths = self.selection.depths

        def run_at_depths(*args: Any, **kwargs: Any) -> Any:
            with self.selection.at(depths):
                return self.run_original(*args, **kwargs)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self._statistics_kept()

        return checkpoint(run_at_depths, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        buffers = list(self.module.buffers())
        for submodule in self.module.modules():
            forward = vars(submodule).get("forward")
            if isinstance(forward, PerStreamForward):
                buffers += forward.copies.buffers()
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, values in zip(buffers, before, strict=True):
                buffer.data.copy_(values)  # `data`, so that autograd takes no notice


class SkippableForward(ElasticForward):
    """The ``forward`` of a block: the rows of some streams run it, the others bypass it."""

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        grad_checkpointing: bool,
        kept: tuple[bool, ...],
        arriving: StreamAt,
        passthrough: int,
        has_batch_axis: tuple[bool, ...],
    ) -> None:
        super().__init__(module, selection, grad_checkpointing)
        self.kept = kept  # at each depth
        self.arriving = arriving
        self.passthrough = passthrough
        self.has_batch_axis = has_batch_axis

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block on the rows that run it and returns those and the rows that bypass it."""
        depths = self.selection.depths
        running = {self.arriving[depth] for depth in depths if self.kept[depth]}
        bypassing = {self.arriving[depth] for depth in depths if not self.kept[depth]}
        if not bypassing:
            return self.run(*args, **kwargs)
        if not running:
            return pass_through(self.passthrough, args)
        fork = _Fork(len(running | bypassing), len(running), len(bypassing))
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            features, bypass = fork.split(args[0])
            return torch.cat([self.run(features), bypass])
        return self._run_on_trees(fork, args, kwargs)

    def _run_on_trees(self, fork: _Fork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Splits the tensors with a batch axis anywhere in the arguments, and joins the outputs."""
        leaves, tree = _flatten(self, args, kwargs, self.has_batch_axis)
        splits = [
            fork.split(leaf) if has_batch_axis else (leaf, leaf)
            for leaf, has_batch_axis in zip(leaves, self.has_batch_axis, strict=True)
        ]
        (running_args, running_kwargs), (bypassing_args, _) = (
            tree_unflatten([split[side] for split in splits], tree) for side in (0, 1)
        )
        outputs, tree = tree_flatten(self.run(*running_args, **running_kwargs))
        bypassing, _ = tree_flatten(pass_through(self.passthrough, bypassing_args))
        # The leaves that bypass the block are the first ones of the arguments.
        joined = [
            torch.cat([output, bypass]) if has_batch_axis else output
            for output, bypass, has_batch_axis in zip(
                outputs, bypassing, self.has_batch_axis, strict=False
            )
        ]
        return tree_unflatten(joined, tree)


class _Fork(NamedTuple):
    """The way of the streams that arrive at a block; one of them may both run and bypass it."""

    num_streams: int
    num_running: int
    num_bypassing: int

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows that run the block and the rows that bypass it."""
        rows = len(features) // self.num_streams
        bypass_start = self.num_streams - self.num_bypassing
        running_and_bypassing: tuple[Tensor, Tensor] = _SplitRows.apply(
            features, self.num_running * rows, bypass_start * rows
        )
        return running_and_bypassing


class _SplitRows(torch.autograd.Function):
    """The rows that run a block and the rows that bypass it; they overlap where a stream forks.

    Two slices would do, but the gradient of each would be a zero-filled copy of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, num_running: int, bypass_start: int
    ) -> tuple[Tensor, Tensor]:
        ctx.num_running, ctx.bypass_start = num_running, bypass_start
        return features[:num_running], features[bypass_start:]

    @staticmethod
    def backward(ctx: Any, running: Tensor, bypassing: Tensor) -> tuple[Tensor, None, None]:
        num_shared = ctx.num_running - ctx.bypass_start
        if not num_shared:
            return torch.cat([running, bypassing]), None, None
        shared = running[ctx.bypass_start :] + bypassing[:num_shared]
        return (
            torch.cat([running[: ctx.bypass_start], shared, bypassing[num_shared:]]),
            None,
            None,
        )


class ExpandingForward(ElasticForward):
    """The ``forward`` of a module in which streams fork as they enter it."""

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        expansion: Expansion,
        has_batch_axis: tuple[bool, ...],
    ) -> None:
        super().__init__(module, selection)
        self.expansion = expansion
        self.has_batch_axis = has_batch_axis

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module on all streams that are inside it."""
        outside, inside = self.expansion.outside, self.expansion.inside
        # For each stream inside, the one that it comes from.
        sources = [*{inside[depth]: outside[depth] for depth in self.selection.depths}.values()]
        if len(sources) == len(set(sources)):
            return self.run_original(*args, **kwargs)
        leaves, tree = _flatten(self, args, kwargs, self.has_batch_axis)
        leaves = [
            _expand(leaf, sources) if has_batch_axis else leaf
            for leaf, has_batch_axis in zip(leaves, self.has_batch_axis, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, tree)
        return self.run_original(*args, **kwargs)


def _expand(features: Tensor, sources: list[int]) -> Tensor:
    arriving = dict.fromkeys(sources)
    rows = dict(zip(arriving, features.chunk(len(arriving)), strict=True))
    return torch.cat([rows[source] for source in sources])


def _flatten(
    forward: ElasticForward, args: Any, kwargs: Any, has_batch_axis: tuple[bool, ...]
) -> tuple[list[Any], Any]:
    leaves, tree = tree_flatten((args, kwargs))
    if len(leaves) != len(has_batch_axis):
        raise TeamNetError(
            f"{type(forward.module).__name__} is called with {len(leaves)} values, but with "
            f"{len(has_batch_axis)} when the net was made elastic. Call it the same way each time."
        )
    return leaves, tree


class PerStreamForward(ElasticForward):
    """The ``forward`` of a layer that couples samples, such as batch norm: it runs once per stream.

    The layer itself belongs to the first stream; each further stream has a copy of it with running
    statistics of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        copies: nn.ModuleList,
        stream_at: StreamAt,
    ) -> None:
        super().__init__(module, selection)
        self.copies = copies
        self.stream_at = stream_at

    def __call__(self, features: Tensor) -> Any:
        """Runs the rows of each stream, shape ``(rows, ...)`` in and out."""
        stream_at = self.stream_at
        streams = sorted({stream_at[i] for i in self.selection.depths if i < len(stream_at)})
        layers = [self.run_original, *self.copies]
        if len(streams) == 1:
            return layers[streams[0]](features)
        parts = zip(streams, features.chunk(len(streams)), strict=True)
        return torch.cat([layers[stream](rows) for stream, rows in parts])

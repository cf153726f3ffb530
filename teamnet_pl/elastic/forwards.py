"""The forwards that carry out a plan: each stands in for the ``forward`` of one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from teamnet_pl.elastic.plan import Expansion, Fork, pass_through
from teamnet_pl.errors import TeamNetError


@dataclass
class Selection:
    """The depth that all forwards of one net run at: its index, or None for all of them, packed."""

    depth: int | None = 0

    @contextmanager
    def at(self, depth: int | None) -> Iterator[None]:
        """Selects another depth within a ``with`` block."""
        before = self.depth
        self.depth = depth
        try:
            yield
        finally:
            self.depth = before

    def __reduce__(self) -> tuple[type[Selection], tuple[()]]:
        """Leaves the depth out of a copy, which is not within the scope of the original."""
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
        """Runs the module at the selected depth."""
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
        depth = self.selection.depth

        def run_at_depth(*args: Any, **kwargs: Any) -> Any:
            with self.selection.at(depth):
                return self.run_original(*args, **kwargs)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self._statistics_kept()

        return checkpoint(run_at_depth, *args, use_reentrant=False, context_fn=contexts, **kwargs)

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
        fork: Fork,
        passthrough: int,
        has_batch_axis: tuple[bool, ...],
    ) -> None:
        super().__init__(module, selection, grad_checkpointing)
        self.kept = kept  # at each depth
        self.fork = fork
        self.passthrough = passthrough
        self.has_batch_axis = has_batch_axis

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block on the rows that run it and returns those and the rows that bypass it."""
        depth, fork = self.selection.depth, self.fork
        if depth is not None:
            kept = self.kept[depth]
            return self.run(*args, **kwargs) if kept else pass_through(self.passthrough, args)
        if fork.bypass_start == fork.num_streams:
            return self.run(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            running, bypassing = self._split(args[0])
            return torch.cat([self.run(running), bypassing])
        return self._run_on_trees(args, kwargs)

    def _run_on_trees(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Splits the tensors with a batch axis anywhere in the arguments, and joins the outputs."""
        leaves, tree = _flatten(self, args, kwargs, self.has_batch_axis)
        splits = [
            self._split(leaf) if has_batch_axis else (leaf, leaf)
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

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(features) // self.fork.num_streams
        running_and_bypassing: tuple[Tensor, Tensor] = _SplitRows.apply(
            features, self.fork.num_running * rows, self.fork.bypass_start * rows
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
        if self.selection.depth is not None:
            return self.run_original(*args, **kwargs)
        leaves, tree = _flatten(self, args, kwargs, self.has_batch_axis)
        leaves = [
            self._expand(leaf) if has_batch_axis else leaf
            for leaf, has_batch_axis in zip(leaves, self.has_batch_axis, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, tree)
        return self.run_original(*args, **kwargs)

    def _expand(self, features: Tensor) -> Tensor:
        streams = features.chunk(self.expansion.num_streams)
        return torch.cat([streams[source] for source in self.expansion.sources])


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
        stream_at: tuple[int, ...],
    ) -> None:
        super().__init__(module, selection)
        self.copies = copies
        self.stream_at = stream_at  # at each depth that runs the layer

    def __call__(self, features: Tensor) -> Any:
        """Runs the rows of each stream, shape ``(rows, ...)`` in and out."""
        depth = self.selection.depth
        if depth is not None:
            stream = self.stream_at[depth]
            return self.copies[stream - 1](features) if stream else self.run_original(features)
        first, *others = features.chunk(len(self.copies) + 1)
        outputs = [layer(rows) for layer, rows in zip(self.copies, others, strict=True)]
        return torch.cat([self.run_original(first), *outputs])

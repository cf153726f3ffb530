"""Running a copy of a backbone to observe the calls of its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from teamnet_pl.elastic.outputs import has_batch
from teamnet_pl.elastic.plan import pass_through
from teamnet_pl.errors import TeamNetError

_Hook = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: Name of the module.
        has_batch_axis: For each leaf of the arguments, whether it is a tensor whose first axis
            grows with the batch.
        shapes: Shape of each tensor in the arguments.
        passthrough: The arguments that have the form of the output, as in `Block.passthrough`;
            None if there are none.
        residual: Whether a copy of the module without weights returns just these arguments.
    """

    name: str
    has_batch_axis: tuple[bool, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    passthrough: int | None = None
    residual: bool = False


@contextmanager
def hooks(
    probe: nn.Module, before: _Hook | None = None, after: _Hook | None = None
) -> Iterator[None]:
    """Calls back around each call of a module, with its name, within a ``with`` block."""
    handles = []
    try:
        for name, module in probe.named_modules():
            if before is not None:
                # The output is None, so that both hooks have the same signature.
                hook = partial(before, name)
                handles.append(
                    module.register_forward_pre_hook(
                        lambda *called, hook=hook: hook(*called, None), with_kwargs=True
                    )
                )
            if after is not None:
                hook = partial(after, name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(probe: nn.Module, images: Tensor) -> Any:
    """Runs a probe with the same random draws each time, without advancing the caller's.

    Returns:
        Its outputs.

    Raises:
        TeamNetError: If it fails or returns nothing with a batch axis.
    """
    name, mode = type(probe).__name__, "training" if probe.training else "evaluation"
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        try:
            output = probe(images)
        except Exception as error:
            raise TeamNetError(
                f"{name} fails on images of shape {tuple(images.shape[1:])} in {mode}: {error}"
            ) from error
    if not has_batch(output, len(images)):
        returned = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TeamNetError(
            f"{name} must return a tensor whose first axis is the batch, such as logits of shape "
            f"(N, classes), alone or in tuples or dictionaries; for N={len(images)} it returned "
            f"{returned} in {mode}."
        )
    return output


def returns_logits(probe: nn.Module, images: Tensor) -> bool:
    """Tells whether a probe returns logits alone, shape ``(N, classes)``, in its mode.

    Raises:
        TeamNetError: If it fails or returns nothing with a batch axis.
    """
    output = run(probe, images)
    return isinstance(output, Tensor) and output.ndim == 2


def record_calls(probe: nn.Module, images: Tensor) -> list[Call]:
    """Runs a probe twice, with different numbers of images, and compares the calls.

    Args:
        probe: The net, in evaluation mode.
        images: An even number; half of them are run first.

    Returns:
        The calls of its sub-modules and of itself, in the order in which they began.

    Raises:
        TeamNetError: If it fails, returns nothing with a batch axis, or runs
            other modules for more images.
    """
    fewer = images[: len(images) // 2]
    sizes = _record_sizes(probe, fewer)
    recorder = _CallRecorder(sizes)
    with hooks(probe, recorder.begin, recorder.end):
        run(probe, images)
    calls = recorder.calls
    if len(calls) != len(sizes):
        raise TeamNetError(
            f"{type(probe).__name__} runs {len(sizes)} modules for {len(fewer)} images and "
            f"{len(calls)} for {len(images)}: the modules that run must not depend on the batch."
        )
    return calls


def _record_sizes(probe: nn.Module, images: Tensor) -> list[list[Any]]:
    """The size of each leaf of the arguments, for each call."""
    sizes: list[list[Any]] = []

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        sizes.append([_size(leaf) for leaf in tree_leaves((args, kwargs))])

    with hooks(probe, begin):
        run(probe, images)
    return sizes


class _CallRecorder:
    """Hooks that record calls next to those of a run with fewer images.

    Args:
        sizes_for_fewer: The sizes in that run, see `_record_sizes`.
    """

    def __init__(self, sizes_for_fewer: list[list[Any]]) -> None:
        self.calls: list[Call] = []
        self._sizes_for_fewer = sizes_for_fewer
        self._running: list[_RunningCall] = []
        self._is_paused = False

    def begin(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
    ) -> None:
        """Records a call that begins."""
        if self._is_paused:
            return
        leaves = tree_leaves((args, kwargs))
        has_batch_axis, scales_numbers = self._compare_sizes(leaves)
        shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        call = Call(name, has_batch_axis, shapes)
        self.calls.append(call)
        self._running.append(_RunningCall(call, _versions(leaves), scales_numbers))

    def _compare_sizes(self, leaves: list[Any]) -> tuple[tuple[bool, ...], bool]:
        """Which leaves have a batch axis, and whether a number grows with the batch."""
        index = len(self.calls)
        fewer = self._sizes_for_fewer[index] if index < len(self._sizes_for_fewer) else []
        has_batch_axis: list[bool] = []
        scales_numbers = False
        for leaf, size in zip(leaves, fewer, strict=False):
            grows = _size(leaf) != size
            has_batch_axis.append(grows and isinstance(leaf, Tensor))
            scales_numbers |= grows and not isinstance(leaf, Tensor)
        return tuple(has_batch_axis), scales_numbers

    def end(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Records whether a call that ends could be skipped."""
        if self._is_paused:
            return
        running = self._running.pop()
        if not args or not _has_parameters(module):
            return
        # A number that grows with the batch would be wrong for some of its rows, and an input that
        # the module modifies would stay as it was if the module were skipped.
        if running.scales_numbers or running.versions != _versions(tree_leaves((args, kwargs))):
            return
        call = running.call
        call.passthrough = _find_passthrough(args, output)
        # A layer is not a block: a PReLU, too, returns its input when its weights are zero.
        if call.passthrough is not None and _has_children(module):
            with self._paused():
                call.residual = _is_residual(module, call.passthrough, args, kwargs)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Ignores calls within a ``with`` block."""
        self._is_paused = True
        yield
        self._is_paused = False


@dataclass
class _RunningCall:
    """A call that has begun and not ended yet.

    Attributes:
        call: Its record.
        versions: Those of the tensors in its arguments when it began.
        scales_numbers: Whether its arguments include a number that grows with the batch.
    """

    call: Call
    versions: list[int]
    scales_numbers: bool


def _size(leaf: Any) -> Any:
    """The part of a leaf that may grow with the batch: the length of a tensor, or a number."""
    if isinstance(leaf, Tensor):
        return leaf.shape[:1]
    return leaf if isinstance(leaf, int | float) else None


def _versions(leaves: list[Any]) -> list[int]:
    """Counts that operations in place increase."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _find_passthrough(args: tuple[Any, ...], output: Any) -> int | None:
    """Finds the arguments that are like the output, see `Call.passthrough`."""
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[0])):
        return None
    if _has_same_form(args[0], output):
        return 0
    if type(output) is tuple and output and _has_same_form(args[: len(output)], output):
        return len(output)
    return None


def _has_same_form(a: Any, b: Any) -> bool:
    """Whether two values are equal but for the values of their tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_has_same_form, a, b))
    equal: bool = a is b or (isinstance(a, int | float | str) and a == b)
    return equal


def _is_residual(
    module: nn.Module, passthrough: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a module without weights passes a random input through."""
    if all(parameter.ndim < 2 for parameter in module.parameters()):
        return False  # a norm with its activation is not a block
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    num_passed = passthrough or 1
    passed, others = args[:num_passed], args[num_passed:]

    def passes_through(weights: dict[str, Tensor]) -> bool:
        features = tree_map(_random_like, passed)
        copies = tree_map(_clone, features)  # which the module may write into
        output = functional_call(module, weights, (*copies, *others), kwargs)
        return _is_close(output, pass_through(passthrough, features))

    return any(
        passes_through({name: weight_for(name, value) for name, value in floats.items()})
        for weight_for in (_zero_weight, _neutral_weight)
    )


def _zero_weight(name: str, value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _neutral_weight(name: str, value: Tensor) -> Tensor:
    """Zero for matrices, but one for factors (of a norm, of a scaled shortcut)."""
    is_factor = value.ndim < 2 and not name.endswith(("bias", "running_mean"))
    return torch.full_like(value, float(is_factor))


def _random_like(leaf: Any) -> Any:
    """Random values instead of features, which may all be zero.

    Large ones, since an activation after the sum (a SiLU, say) lets large values through.
    """
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return 20 + torch.rand_like(leaf)
    return leaf


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _is_close(output: Any, expected: Any) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-4) if isinstance(a, Tensor) else a == b
        for a, b in zip(tree_leaves(output), tree_leaves(expected), strict=True)
    )


def record_order(
    probe: nn.Module, images: Tensor, names: Collection[str]
) -> list[tuple[str, bool]]:
    """Runs a probe and lists the calls of some modules: name, and whether it begins or ends."""
    names = set(names)
    events: list[tuple[str, bool]] = []

    def begin(name: str, *_: Any) -> None:
        if name in names:
            events.append((name, True))

    def end(name: str, *_: Any) -> None:
        if name in names:
            events.append((name, False))

    with hooks(probe, begin, end):
        run(probe, images)
    return events

"""Running a copy of a backbone to see what its modules do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from teamnet_pl.errors import TeamNetError

_Hook = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass
class Call:
    """One call of a sub-module.

    Attributes:
        name: Name of the sub-module.
        batched: For each leaf of the arguments, whether it is a tensor whose first axis grows with
            the batch.
        hands_on: What would stand for the output if the module were skipped: 0 for its first
            argument, k for a tuple of its first k arguments, None if the output is nothing alike.
        residual: Whether a copy of it without weights does hand that on.
    """

    name: str
    batched: tuple[bool, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    hands_on: int | None = None
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
                # So that both kinds are called alike.
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
def run(probe: nn.Module, images: Tensor) -> None:
    """Runs a probe, with the same random draws each time and none that the caller would miss.

    Raises:
        ValueError: If it fails or does not return logits.
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
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TeamNetError(
            f"{name} must return logits of shape (N, classes); for N={len(images)} it returned "
            f"{what} in {mode}. Switch off auxiliary heads and the like by the net's own options."
        )


def record_calls(probe: nn.Module, images: Tensor) -> list[Call]:
    """Runs a probe twice, with another number of images, and compares.

    Args:
        probe: The net, in evaluation mode.
        images: An even number; half of them are run first.

    Returns:
        The calls of its sub-modules and of itself, in the order in which they began.
    """
    leaves: list[list[Any]] = []
    calls: list[Call] = []
    begun: list[tuple[Call, list[int]]] = []
    testing = False

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        leaves.append([_size(leaf) for leaf in tree_leaves((args, kwargs))])

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if testing:
            return
        index, found = len(calls), tree_leaves((args, kwargs))
        fewer = leaves[index] if index < len(leaves) else []
        sizes = [_size(leaf) for leaf in found]
        grows = tuple(
            isinstance(leaf, Tensor) and size != less
            for leaf, size, less in zip(found, sizes, fewer, strict=False)
        )
        shapes = tuple(leaf.shape for leaf in found if isinstance(leaf, Tensor))
        calls.append(call := Call(name, grows, shapes))
        # A number that grows with the batch would be wrong for some of its rows.
        depends = any(
            size != less and not grown
            for size, less, grown in zip(sizes, fewer, grows, strict=False)
        )
        begun.append((call, [] if depends else _versions(found)))

    def end(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal testing
        if testing:
            return
        call, versions = begun.pop()
        changed = versions != _versions(tree_leaves((args, kwargs)))  # skipped, it would not be
        if not versions or changed or not args or next(module.parameters(), None) is None:
            return
        call.hands_on = _alike(args, output)
        # A layer is no block: a PReLU too hands its input on when its weights are zero.
        if call.hands_on is not None and next(module.children(), None) is not None:
            testing = True
            call.residual = any(
                _hands_on_without_weights(module, state, call, args, kwargs)
                for state in (_zero, _neutral)
            )
            testing = False

    with hooks(probe, before=note):
        run(probe, images[: len(images) // 2])
    with hooks(probe, begin, end):
        run(probe, images)
    if len(calls) != len(leaves):
        raise TeamNetError(
            f"{type(probe).__name__} runs {len(leaves)} modules for {len(images) // 2} images and "
            f"{len(calls)} for {len(images)}: what it runs must not depend on the batch."
        )
    return calls


def _size(leaf: Any) -> Any:
    """What may grow with the batch: the length of a tensor, a number."""
    if isinstance(leaf, Tensor):
        return leaf.shape[:1]
    return leaf if isinstance(leaf, int | float) else None


def _versions(leaves: list[Any]) -> list[int]:
    """In-place operations count them up."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _alike(args: tuple[Any, ...], output: Any) -> int | None:
    """See `Call.hands_on`."""

    def alike(a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(a, Tensor):
            return bool(a.shape == b.shape and a.dtype == b.dtype)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(alike, a, b))
        same: bool = a is b or (isinstance(a, int | float | str) and a == b)
        return same

    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[0])):
        return None
    if alike(args[0], output):
        return 0
    if type(output) is tuple and output and alike(args[: len(output)], output):
        return len(output)
    return None


def handed_on(hands_on: int, args: tuple[Any, ...]) -> Any:
    """What stands for the output of a skipped call, see `Call.hands_on`."""
    return args[:hands_on] if hands_on else args[0]


def _zero(name: str, value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _neutral(name: str, value: Tensor) -> Tensor:
    """Matrices at zero, but what scales an input hands it on (a norm, a scaled shortcut)."""
    scales = value.ndim < 2 and not name.endswith(("bias", "running_mean"))
    return torch.full_like(value, float(scales))


def _hands_on_without_weights(
    module: nn.Module,
    state: Callable[[str, Tensor], Tensor],
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Whether a module, with its weights in some state, hands a random input on."""
    assert call.hands_on is not None
    if all(value.ndim < 2 for value in module.parameters()):
        return False  # a norm with its activation is no block
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    states = {
        name: state(name, value) for name, value in tensors.items() if value.is_floating_point()
    }
    # Not the features seen, which may be all zero; large, since an activation after the sum (a
    # SiLU, say) hands large values on.
    first = len(args[: call.hands_on or 1])
    features = tree_map(
        lambda leaf: (
            20 + torch.rand_like(leaf)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        args[:first],
    )
    copies = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, features)
    output = functional_call(module, states, (*copies, *args[first:]), kwargs)
    expected = handed_on(call.hands_on, features)
    return all(
        torch.allclose(a, b, rtol=1e-4) if isinstance(a, Tensor) else a == b
        for a, b in zip(tree_leaves(output), tree_leaves(expected), strict=True)
    )


def record_order(probe: nn.Module, images: Tensor, names: Sequence[str]) -> list[tuple[str, bool]]:
    """Runs a probe as it is and lists where the calls of some modules begin (True) and end."""
    wanted, events = set(names), []

    def begin(name: str, *_: Any) -> None:
        if name in wanted:
            events.append((name, True))

    def end(name: str, *_: Any) -> None:
        if name in wanted:
            events.append((name, False))

    with hooks(probe, begin, end):
        run(probe, images)
    return events

"""Finding the blocks of a backbone that can be skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teamnet_pl.elastic.evaluation import example_images

SAMPLE_MIXING_NORMS = (nn.modules.batchnorm._BatchNorm,)
"""Layers that normalise over the batch: batch norm of any dimension, synchronised or not."""


@dataclass(frozen=True)
class Block:
    """A sub-module that can be skipped.

    Attributes:
        name: Its name in the backbone, such as ``layer3.1``.
        stage: Index of its stage: consecutive blocks of one parent and one feature-map shape.
    """

    name: str
    stage: int


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a backbone runs, found without touching the backbone itself.

    Attributes:
        blocks: Skippable blocks, in the order in which they run.
        norms: Names of the layers that normalise over the batch, each with the number of blocks
            that have begun before it and the index of the block that it is inside of, if any.
    """

    blocks: tuple[Block, ...]
    norms: dict[str, tuple[int, int | None]]

    @property
    def stages(self) -> list[int]:
        """Number of skippable blocks in each stage."""
        return [
            sum(block.stage == stage for block in self.blocks)
            for stage in range(self.blocks[-1].stage + 1)
        ]


@dataclass
class _Call:
    name: str
    version: int | None
    """Of the input tensor when the call began; in-place operations count it up."""
    shape: torch.Size | None = None
    """Of the input, where the call maps one tensor to another of the same shape."""
    residual: bool = False


def trace(
    backbone: nn.Module, input_shape: Sequence[int], patterns: Sequence[str] | None = None
) -> Trace:
    """Finds the skippable blocks of a backbone.

    A block is skippable when its output has its input's shape. Of those, the ones an expert would
    pick are the residual blocks: with every weight at zero such a block hands its input on. Where
    residual blocks are nested, the innermost ones are taken, so a whole stage never is a block.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``.
        input_shape: Shape of one image, such as ``(3, 32, 32)``. Only what is found depends on it,
            the net still takes any size that the backbone takes.
        patterns: Names of the blocks, with wildcards as in `fnmatch`, instead of the search:
            ``["layer3.*"]``. They need the right shape but need not be residual.

    Returns:
        The blocks and the layers that normalise over the batch.

    Raises:
        ValueError: If there is no such block, a pattern fits none, the backbone does not take the
            input or does not return logits, one of its layers mixes the samples of a batch in a
            way that is not known, or has a forward set on the instance, as `ElasticNet` does.
    """
    for name, module in backbone.named_modules():
        if "forward" in vars(module):
            raise ValueError(
                f"{name or type(backbone).__name__} has a forward of its own set on the instance: "
                "is the backbone elastic already? Pass a copy that is not."
            )
    probe = copy.deepcopy(backbone).eval()
    images = example_images(probe, 2, input_shape)
    calls = _run(probe, images)
    names = [call.name for call in calls]
    skippable = [call for call in calls if call.shape is not None and names.count(call.name) == 1]
    if patterns is None:
        found = [call for call in skippable if call.residual]
        found = [a for a in found if not any(b.name.startswith(f"{a.name}.") for b in found)]
        if not found:
            raise ValueError(
                f"{type(backbone).__name__} has no residual block that keeps its input's shape, so "
                "none can be skipped. Name blocks by patterns if it has any other, or use a net "
                "with residual connections."
            )
    else:
        found = _matching(calls, skippable, patterns, backbone)
    blocks: list[Block] = []
    last: tuple[str, torch.Size | None] | None = None
    for call in found:
        stage = (call.name.rpartition(".")[0], call.shape)
        blocks.append(Block(call.name, blocks[-1].stage + (stage != last) if blocks else 0))
        last = stage
    norms = _norms(probe, images, [block.name for block in blocks])
    _refuse_mixing(probe, images, blocks)
    return Trace(tuple(blocks), norms)


def _run(probe: nn.Module, images: Tensor) -> list[_Call]:
    """Runs the probe and returns its sub-modules' calls in the order in which they began."""
    calls: list[_Call] = []
    begun: list[_Call] = []
    testing = False

    def begin(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not testing:
            first = args[0] if args else None
            version = first._version if isinstance(first, Tensor) else None
            calls.append(call := _Call(name, version))
            begun.append(call)

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal testing
        if testing:
            return
        call = begun.pop()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        same_shape = (
            isinstance(output, Tensor)
            and len(tensors) == 1
            and args
            and args[0] is tensors[0]
            and call.version == tensors[0]._version  # a skipped block must leave its input alone
            and output.shape == tensors[0].shape
        )
        if not same_shape or next(module.parameters(), None) is None:
            return
        call.shape = output.shape
        if next(module.children(), None) is None:
            return  # a layer is no block: a PReLU too hands its input on when its weights are zero
        testing = True
        state = (*module.named_parameters(), *module.named_buffers())
        zeros = {
            name: torch.zeros_like(value) for name, value in state if value.is_floating_point()
        }
        # Not the features seen, which may be all zero; not negative, for a ReLU after the sum.
        features = torch.rand_like(args[0])
        output = functional_call(module, zeros, (features.clone(), *args[1:]), kwargs)
        call.residual = torch.equal(output, features)
        testing = False

    with _hooks() as handles:
        for name, module in probe.named_modules():
            if module is not probe:
                handles.append(module.register_forward_pre_hook(partial(begin, name)))
                handles.append(module.register_forward_hook(end, with_kwargs=True))
        _forward(probe, images)
    return calls


@torch.no_grad()
def _forward(probe: nn.Module, images: Tensor) -> None:
    """Runs the probe, with the same random draws each time and none that the caller would miss."""
    name, mode = type(probe).__name__, "training" if probe.training else "evaluation"
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        try:
            output = probe(images)
        except Exception as error:
            raise ValueError(
                f"{name} fails on images of shape {tuple(images.shape[1:])} in {mode}: {error}"
            ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{name} must return logits of shape (N, classes); for N={len(images)} it returned "
            f"{what} in {mode}."
        )


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _matching(
    calls: list[_Call], skippable: list[_Call], patterns: Sequence[str], backbone: nn.Module
) -> list[_Call]:
    """Of all that a pattern matches the outermost are meant: `layer3.*` also matches inside."""
    matches = {
        pattern: {call.name for call in calls if fnmatchcase(call.name, pattern)}
        for pattern in patterns
    }
    every = set().union(*matches.values())
    outermost = {name for name in every if not any(name.startswith(f"{o}.") for o in every)}
    found = [call for call in skippable if call.name in outermost]
    for pattern, matched in matches.items():
        if not any(call.name in matched for call in found):
            names = ", ".join(call.name for call in skippable)
            raise ValueError(
                f"No block of {type(backbone).__name__} that keeps its input's shape matches "
                f"{pattern!r}. There are: {names or 'none'}."
            )
    return found


def _refuse_mixing(probe: nn.Module, images: Tensor, blocks: Sequence[Block]) -> None:
    """Compares what becomes of the first image beside two different second images."""
    probe.train()
    for module in probe.modules():
        if isinstance(module, SAMPLE_MIXING_NORMS):
            module.eval()
            if module.running_mean is None:  # or it would mix in evaluation too
                module.running_mean = torch.zeros(module.num_features).to(images)
                module.running_var = torch.ones(module.num_features).to(images)
    generator = torch.Generator(images.device).manual_seed(0)
    for parameter in probe.parameters():
        if parameter.abs().max() <= 1e-2:  # behind weights of zero nothing would show
            nn.init.normal_(parameter, std=0.1, generator=generator)
    features: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim and len(output) % len(images) == 0:
            features.append((name, output[: len(output) // len(images)].clone()))

    with _hooks() as handles:
        for name, module in probe.named_modules():
            handles.append(module.register_forward_hook(partial(record, name)))
        _forward(probe, images)
        _forward(probe, torch.stack([images[0], 2 * images[1] + 1]))
    half = len(features) // 2
    pairs = zip(features[:half], features[half:], strict=True)
    same = {name: torch.allclose(a, b, rtol=1e-4, atol=1e-5) for (name, a), (_, b) in pairs}
    if not same[""]:
        name = next(name for name, is_same in same.items() if not is_same)
        kind = type(probe.get_submodule(name)).__name__
        raise ValueError(
            f"{name or 'The backbone'} ({kind}) mixes the samples of a batch, so depths cannot "
            "share a forward pass. Of such layers only batch norm is supported; replace this one."
        )
    for block in blocks:
        if not same.get(block.name, False):
            raise ValueError(
                f"The first axis of what {block.name} returns is not the batch, so depths cannot "
                "share a forward pass. Use a batch-first net."
            )


def _norms(
    probe: nn.Module, images: Tensor, blocks: list[str]
) -> dict[str, tuple[int, int | None]]:
    """Runs the probe as in training and notes where each batch norm stands among the blocks."""
    places: dict[str, tuple[int, int | None]] = {}
    order: list[str] = []

    def begin_block(name: str, *_: Any) -> None:
        order.append(name)

    def begin_norm(name: str, *_: Any) -> None:
        inside = bool(order) and name.startswith(f"{order[-1]}.")
        place = (len(order), len(order) - 1 if inside else None)
        if places.setdefault(name, place) != place:
            raise ValueError(
                f"{name} runs in several places, with different depths in each; its running "
                "statistics cannot be kept. Give each place a batch norm of its own."
            )

    probe.train()
    modules = dict(probe.named_modules())
    with _hooks() as handles:
        for name in blocks:
            handles.append(modules[name].register_forward_pre_hook(partial(begin_block, name)))
        for name, module in modules.items():
            if isinstance(module, SAMPLE_MIXING_NORMS):
                handles.append(module.register_forward_pre_hook(partial(begin_norm, name)))
        _forward(probe, images)
    if order != blocks:
        raise ValueError(
            f"In training {type(probe).__name__} runs its blocks as {order}, in evaluation as "
            f"{blocks}: depths need the same order in both."
        )
    return places

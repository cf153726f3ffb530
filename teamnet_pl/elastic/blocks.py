"""Finding the blocks of a backbone that can be skipped."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.elastic.mixing import find_mixing
from teamnet_pl.elastic.probing import Call, record_calls, record_order
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class Block:
    """A sub-module that can be skipped.

    Attributes:
        name: Its name in the backbone, such as ``layer3.1``.
        stage: Index of its stage: consecutive blocks of one parent and one feature-map shape.
        hands_on: What stands for its output where it is skipped: 0 for its first argument, k for a
            tuple of its first k arguments.
    """

    name: str
    stage: int
    hands_on: int = 0


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a backbone runs, found without touching the backbone itself.

    Attributes:
        blocks: Skippable blocks, in the order in which they run.
        mixing: Names of the layers that mix the samples of a batch, such as batch norms.
        order: Where the calls of those, of the blocks and of what they are in begin (True) and end
            in training; the backbone itself is "".
        batched: By name, for each leaf of a module's arguments whether it has a batch axis.
    """

    blocks: tuple[Block, ...]
    mixing: tuple[str, ...]
    order: tuple[tuple[str, bool], ...]
    batched: dict[str, tuple[bool, ...]]

    @property
    def stages(self) -> list[int]:
        """Number of skippable blocks in each stage."""
        return [
            sum(block.stage == stage for block in self.blocks)
            for stage in range(self.blocks[-1].stage + 1)
        ]


def trace(
    backbone: nn.Module, input_shape: Sequence[int], patterns: Sequence[str] | None = None
) -> Trace:
    """Finds the skippable blocks of a backbone.

    A block can be skipped when what it returns looks like its first argument or arguments, which
    then stand for it. Of those, the ones an expert would pick are the residual blocks: without its
    weights such a block hands its input on. Where residual blocks are nested, a stage is told from
    a block by its repeated, numbered children.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``.
        input_shape: Shape of one image, such as ``(3, 32, 32)``. Only what is found depends on it,
            the net still takes any size that the backbone takes.
        patterns: Names of the blocks, with wildcards as in `fnmatch`, instead of the search:
            ``["layer3.*"]``. They need the right shape but need not be residual.

    Returns:
        The blocks, the layers that mix samples, and the order in which they run.

    Raises:
        ValueError: If there is no such block, a pattern fits none, the backbone does not take the
            input or does not return logits, or it mixes the samples of a batch around its blocks.
    """
    probe = copy.deepcopy(backbone).eval()
    images = example_images(probe, 4, input_shape)
    calls = record_calls(probe, images)
    times = Counter(call.name for call in calls)
    skippable = [call for call in calls if call.hands_on is not None and times[call.name] == 1]
    if patterns is None:
        found = _residual(skippable, probe)
        if not found:
            again = {call.name for call in calls if call.residual} - {call.name for call in found}
            raise TeamNetError(
                f"{type(backbone).__name__} has no residual block that keeps its input's shape"
                + (f" and runs once ({', '.join(again)} run again)" if again else "")
                + ", so none can be skipped: name blocks by patterns if it has any other, or use a "
                "net with residual connections."
            )
    else:
        found = _matching(calls, skippable, patterns, backbone)
    blocks = _in_stages(found)
    names = [block.name for block in blocks]
    probe.train()
    mixing = find_mixing(probe, images, names)
    around = {call.name for call in calls if _holds(call.name, names)}
    order = record_order(probe, images[:2], [*names, *around, *mixing])
    in_training = [name for name, begins in order if begins and name in names]
    if in_training != names:
        raise TeamNetError(
            f"In training {type(probe).__name__} runs its blocks as {in_training}, in evaluation "
            f"as {names}: depths need the same order in both."
        )
    batched = {call.name: call.batched for call in calls if call.name in {*names, *around}}
    return Trace(tuple(blocks), tuple(mixing), tuple(order), batched)


def _holds(name: str, blocks: Sequence[str]) -> bool:
    """Whether any of some blocks is inside of a module."""
    return not name or any(block.startswith(f"{name}.") for block in blocks)


def _residual(skippable: list[Call], probe: nn.Module) -> list[Call]:
    """The residual blocks; of nested ones the outermost that is no stage."""
    chosen: set[str] = set()
    candidates = [call.name for call in skippable if call.residual and call.name]
    for name in sorted(candidates, key=lambda name: -name.count(".")):
        inner = {other for other in chosen if other.startswith(f"{name}.")}
        if not inner or not _is_stage(probe, name, inner):
            chosen = chosen - inner | {name}
    # A part of something else may happen to be residual, and so may a layer, such as a positional
    # encoding: blocks stand in a row, and not all of a row are single layers.
    chosen = {name for name in chosen if _is_in_row(probe, name)} or chosen
    rows = {_parent(name) for name in chosen if _has_layers(probe, name)}
    chosen = {name for name in chosen if _parent(name) in rows} or chosen
    return [call for call in skippable if call.name in chosen]


def _is_stage(probe: nn.Module, name: str, inner: set[str]) -> bool:
    """Whether a module is but a row of numbered blocks, or has several of a kind in a list."""
    keys = [block.rpartition(".")[2] for block in inner]
    if not all(key[-1].isdigit() for key in keys):
        return False
    module = probe.get_submodule(name)
    beginnings = tuple(f"{block.removeprefix(f'{name}.')}." for block in inner)
    weights = module.named_parameters()
    if all(weight.ndim < 2 or own.startswith(beginnings) for own, weight in weights):
        return True
    blocks = [probe.get_submodule(block) for block in inner]
    kinds = [(type(block), [p.shape for p in block.parameters()]) for block in blocks]
    return all(map(str.isdigit, keys)) and any(kinds.count(kind) > 1 for kind in kinds)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_in_row(probe: nn.Module, name: str) -> bool:
    parent = probe.get_submodule(_parent(name))
    return isinstance(parent, nn.Sequential | nn.ModuleList) or name[-1].isdigit()


def _has_layers(probe: nn.Module, name: str) -> bool:
    return sum(weight.ndim > 1 for weight in probe.get_submodule(name).parameters()) > 1


def _in_stages(found: list[Call]) -> list[Block]:
    """Blocks of one container and one shape are a stage; of one shape if each has its own."""
    containers = [_parent(call.name) for call in found]
    if len(set(containers)) == len(containers):
        containers = [""] * len(found)
    blocks: list[Block] = []
    last = None
    for call, container in zip(found, containers, strict=True):
        here = (container, call.shapes)
        stage = blocks[-1].stage + (here != last) if blocks else 0
        assert call.hands_on is not None
        blocks.append(Block(call.name, stage, call.hands_on))
        last = here
    return blocks


def _matching(
    calls: list[Call], skippable: list[Call], patterns: Sequence[str], backbone: nn.Module
) -> list[Call]:
    """Of all that a pattern matches the outermost are meant: `layer3.*` also matches inside."""
    matches = {
        pattern: {call.name for call in calls if call.name and fnmatchcase(call.name, pattern)}
        for pattern in patterns
    }
    every = set().union(*matches.values())
    outermost = {name for name in every if not any(name.startswith(f"{o}.") for o in every)}
    found = [call for call in skippable if call.name in outermost]
    for pattern, matched in matches.items():
        if not any(call.name in matched for call in found):
            names = ", ".join(call.name for call in skippable)
            raise TeamNetError(
                f"No block of {type(backbone).__name__} that keeps its input's shape and runs once "
                f"matches {pattern!r}. There are: {names or 'none'}."
            )
    return found

"""Finding the blocks of a backbone that can be skipped."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from teamnet_pl.elastic.discovery.coupling import find_coupling
from teamnet_pl.elastic.discovery.probing import Call, record_calls, record_order, returns_logits
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.elastic.plan import Block, Trace
from teamnet_pl.errors import TeamNetError


def trace_backbone(
    backbone: nn.Module, input_shape: Sequence[int], patterns: Sequence[str] | None = None
) -> Trace:
    """Finds the skippable blocks of a backbone, by running a copy of it.

    A block can be skipped if its output has the form of its first argument or arguments, which
    then replace it. Of those, the ones that an expert would pick are the residual blocks: without
    its weights such a block returns its input. Where residual blocks are nested, a stage is told
    from a block by its repeated, numbered children.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``, or to any tensors in
            tuples, dictionaries and the like.
        input_shape: Shape of one image, such as ``(3, 32, 32)``. Only the search depends on it; the
            net still takes any size that the backbone takes.
        patterns: Names of the blocks, with wildcards as in `fnmatch`, instead of the search:
            ``["layer3.*"]``. They need the right shape but need not be residual.

    Returns:
        The blocks, the layers that couple samples, and the order in which they run.

    Raises:
        TeamNetError: If there is no such block, a pattern matches none, the backbone does not take
            the input or returns nothing with a batch axis, or it couples the samples of a batch
            around its blocks.
    """
    probe = copy.deepcopy(backbone).eval()
    images = example_images(probe, 4, input_shape)
    calls = record_calls(probe, images)
    logits_in_evaluation = returns_logits(probe, images[:2])
    if patterns is None:
        chosen = _residual_calls(calls, probe)
    else:
        chosen = _matching_calls(calls, patterns, probe)
    blocks = _number_stages(chosen)
    names = [block.name for block in blocks]
    probe.train()
    coupling = find_coupling(probe, images, names)
    around = {call.name for call in calls if _contains_any(call.name, names)}
    order = record_order(probe, images[:2], {*names, *around, *coupling})
    _check_order_in_training(order, names, probe)
    has_batch_axis = {
        call.name: call.has_batch_axis for call in calls if call.name in {*names, *around}
    }
    logits_always = logits_in_evaluation and returns_logits(probe, images[:2])
    return Trace(tuple(blocks), tuple(coupling), tuple(order), has_batch_axis, logits_always)


def siblings_of_blocks(backbone: nn.Module, blocks: Iterable[Block]) -> set[str]:
    """Names the modules in a row with blocks and of their class, such as the first of a stage.

    Args:
        backbone: The net.
        blocks: Its skippable blocks, which are among their siblings.
    """
    siblings = set()
    for block in blocks:
        row = _parent(block.name)
        kind = type(backbone.get_submodule(block.name))
        for key, module in backbone.get_submodule(row).named_children():
            if type(module) is kind:
                siblings.add(f"{row}.{key}" if row else key)
    return siblings


def _contains_any(name: str, blocks: Iterable[str]) -> bool:
    """Whether any of some blocks is inside a module."""
    return not name or any(block.startswith(f"{name}.") for block in blocks)


def _check_order_in_training(
    order: list[tuple[str, bool]], blocks: list[str], probe: nn.Module
) -> None:
    in_training = [name for name, begins in order if begins and name in blocks]
    if in_training != blocks:
        raise TeamNetError(
            f"In training {type(probe).__name__} runs its blocks as {in_training}, in evaluation "
            f"as {blocks}: depths need the same order in both."
        )


def _skippable(calls: list[Call]) -> list[Call]:
    times = Counter(call.name for call in calls)
    return [call for call in calls if call.passthrough is not None and times[call.name] == 1]


def _residual_calls(calls: list[Call], probe: nn.Module) -> list[Call]:
    """The calls of the residual blocks; of nested ones the outermost that is not a stage."""
    skippable = _skippable(calls)
    residual = [call.name for call in skippable if call.residual and call.name]
    names = _outermost_blocks(residual, probe)
    # A part of something else may happen to be residual, and so may a layer, such as a positional
    # encoding: blocks stand in a row, and not all of a row are single layers.
    names = {name for name in names if _is_in_row(name, probe)} or names
    rows = {_parent(name) for name in names if _has_layers(name, probe)}
    names = {name for name in names if _parent(name) in rows} or names
    if not names:
        again = sorted({call.name for call in calls if call.residual})
        raise TeamNetError(
            f"{type(probe).__name__} has no residual block that keeps its input's shape"
            + (f" and runs once ({', '.join(again)} run again)" if again else "")
            + ", so none can be skipped: name blocks by patterns if it has any other, or use a "
            "net with residual connections."
        )
    return [call for call in skippable if call.name in names]


def _outermost_blocks(candidates: list[str], probe: nn.Module) -> set[str]:
    """Of blocks in blocks, the outermost that is not a stage."""
    blocks: set[str] = set()
    for name in sorted(candidates, key=lambda name: -name.count(".")):
        inner = {block for block in blocks if block.startswith(f"{name}.")}
        if not inner or not _is_stage(name, inner, probe):
            blocks = blocks - inner | {name}
    return blocks


def _is_stage(name: str, inner: set[str], probe: nn.Module) -> bool:
    """Whether a module is just a row of numbered blocks, or has several of one kind in a list."""
    keys = [block.rpartition(".")[2] for block in inner]
    if not all(key[-1].isdigit() for key in keys):
        return False
    module = probe.get_submodule(name)
    beginnings = tuple(f"{block.removeprefix(f'{name}.')}." for block in inner)
    parameters = module.named_parameters()
    if all(value.ndim < 2 or key.startswith(beginnings) for key, value in parameters):
        return True
    blocks = [probe.get_submodule(block) for block in inner]
    kinds = [(type(block), [p.shape for p in block.parameters()]) for block in blocks]
    return all(map(str.isdigit, keys)) and any(kinds.count(kind) > 1 for kind in kinds)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_in_row(name: str, probe: nn.Module) -> bool:
    parent = probe.get_submodule(_parent(name))
    return isinstance(parent, nn.Sequential | nn.ModuleList) or name[-1].isdigit()


def _has_layers(name: str, probe: nn.Module) -> bool:
    """Whether a module has more than one layer."""
    return sum(value.ndim > 1 for value in probe.get_submodule(name).parameters()) > 1


def _matching_calls(calls: list[Call], patterns: Sequence[str], probe: nn.Module) -> list[Call]:
    """The calls of the outermost modules that match: `layer3.*` also matches inside of them."""
    skippable = _skippable(calls)
    matches = {
        pattern: {call.name for call in calls if call.name and fnmatchcase(call.name, pattern)}
        for pattern in patterns
    }
    matching = set().union(*matches.values())
    outermost = {name for name in matching if not any(name.startswith(f"{m}.") for m in matching)}
    chosen = [call for call in skippable if call.name in outermost]
    for pattern, matched in matches.items():
        if not any(call.name in matched for call in chosen):
            names = ", ".join(call.name for call in skippable)
            raise TeamNetError(
                f"No block of {type(probe).__name__} that keeps its input's shape and runs once "
                f"matches {pattern!r}. There are: {names or 'none'}."
            )
    return chosen


def _number_stages(calls: list[Call]) -> list[Block]:
    """Blocks of one container and one shape are a stage; of one shape if each has its own."""
    containers = [_parent(call.name) for call in calls]
    if len(set(containers)) == len(containers):
        containers = [""] * len(calls)
    blocks: list[Block] = []
    last = None
    for call, container in zip(calls, containers, strict=True):
        kind = (container, call.shapes)
        stage = blocks[-1].stage + (kind != last) if blocks else 0
        assert call.passthrough is not None
        blocks.append(Block(call.name, stage, call.passthrough))
        last = kind
    return blocks

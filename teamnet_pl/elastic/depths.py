"""The nested depths of a net, as plain data without tensors.

A depth is a set of kept blocks. The depths of one net are nested: each keeps a subset of the blocks
of the next deeper one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

from teamnet_pl.errors import TeamNetError

DepthPolicy = Literal["round_robin", "last_stage_first", "first_stage_first", "evenly_spread"]
"""The order in which blocks are dropped, see `drop_order`."""

DepthSpec: TypeAlias = int | list[int] | list[list[int]]
"""The number of depths, or a list of the blocks that each keeps, in total or per stage."""


@dataclass(frozen=True)
class Depth:
    """One depth of an elastic net.

    Attributes:
        name: ``d`` followed by the number of skippable blocks kept, such as ``d9``.
        kept: One flag for each skippable block, in the order in which they run.
        per_stage: Number of skippable blocks kept in each stage.
    """

    name: str
    kept: tuple[bool, ...]
    per_stage: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Number of skippable blocks kept."""
        return sum(self.per_stage)

    def __str__(self) -> str:
        return self.name


def format_stages(blocks_per_stage: Sequence[int]) -> str:
    """Writes the number of blocks that a depth keeps in each stage.

    Examples:
        >>> format_stages((3, 2, 0))
        '3-2-0'
    """
    return "-".join(map(str, blocks_per_stage))


def drop_order(stages: Sequence[int], policy: DepthPolicy) -> list[int]:
    """Returns the order in which a policy drops blocks.

    Args:
        stages: Number of skippable blocks in each stage, in the order in which they run.
        policy: ``last_stage_first`` and ``first_stage_first`` empty one stage after the other,
            starting from its last block; ``round_robin`` drops the last block of each stage in
            turn, the last stage first; ``evenly_spread`` drops the block whose neighbors are
            nearest to each other, so that the blocks that stay are spread evenly over the whole
            net.

    Returns:
        Indices of all blocks, in the order in which they are dropped.

    Raises:
        TeamNetError: If the policy is unknown.

    Examples:
        >>> drop_order([2, 2], "round_robin")
        [3, 1, 2, 0]
        >>> drop_order([6], "evenly_spread")
        [5, 3, 1, 0, 4, 2]
    """
    if policy not in get_args(DepthPolicy):
        raise TeamNetError(
            f"Unknown depth policy {policy!r}: choose one of {', '.join(get_args(DepthPolicy))}."
        )
    if policy == "evenly_spread":
        return _evenly_spread_order(sum(stages))
    # (stage, position counted from the stage's end, index of the block)
    blocks = [
        (stage, size - 1 - position, sum(stages[:stage]) + position)
        for stage, size in enumerate(stages)
        for position in range(size)
    ]
    keys: dict[str, Callable[[tuple[int, int, int]], tuple[int, int]]] = {
        "round_robin": lambda block: (block[1], -block[0]),
        "last_stage_first": lambda block: (-block[0], block[1]),
        "first_stage_first": lambda block: (block[0], block[1]),
    }
    return [index for _, _, index in sorted(blocks, key=keys[policy])]


def _evenly_spread_order(count: int) -> list[int]:
    order: list[int] = []
    kept = list(range(count))
    while kept:
        fenced = [-1, *kept, count]
        # On a tie the later block is dropped: more depths then share the blocks before it.
        dropped = min(range(len(kept)), key=lambda i: (fenced[i + 2] - fenced[i], -i))
        order.append(kept.pop(dropped))
    return order


def derive_depths(
    stages: Sequence[int],
    spec: DepthSpec,
    policy: DepthPolicy = "last_stage_first",
    interleaved: bool = False,
) -> tuple[Depth, ...]:
    """Derives the nested depths of a net.

    Args:
        stages: Number of skippable blocks in each stage.
        spec: The number of depths, which are spread evenly from all blocks to none; or the number
            of blocks that each depth keeps; or the number that each keeps in each stage (the first
            ones of the stage, whatever the policy).
        policy: Order in which blocks are dropped, see `drop_order`.
        interleaved: Only for a number of depths: whether all but the deepest lie half-way between
            the depths that are not interleaved, so that two nets, one of each kind, have twice as
            many different depths. Where there is no room between them, both are the same.

    Returns:
        The depths, the deepest first. The first one keeps every block.

    Raises:
        TeamNetError: If the depths are fewer than two, repeat, are not nested, do not fit the
            stages or do not include the whole net.

    Examples:
        >>> [d.name for d in derive_depths([9], 4)]
        ['d9', 'd6', 'd3', 'd0']
        >>> [d.name for d in derive_depths([9], 4, interleaved=True)]
        ['d9', 'd8', 'd4', 'd2']
        >>> [(d.name, d.per_stage) for d in derive_depths([2, 1], 3)]
        [('d3', (2, 1)), ('d2', (2, 0)), ('d0', (0, 0))]
        >>> [d.per_stage for d in derive_depths([2, 1], [[2, 1], [1, 0]])]
        [(2, 1), (1, 0)]
    """
    total = sum(stages)
    sizes = f"The net has {total} skippable blocks, {list(stages)} by stage"
    if isinstance(spec, int):
        if not 2 <= spec <= total + 1:
            raise TeamNetError(f"{sizes}, so it has 2 to {total + 1} depths, found {spec}.")
        step = total / (spec - 1)
        counts = [round(total - i * step) for i in range(spec)]
        if interleaved and step >= 2:
            counts[1:] = [round(total - (i + 0.5) * step) for i in range(spec - 1)]
    elif all(isinstance(item, int) for item in spec):
        counts = sorted((item for item in spec if isinstance(item, int)), reverse=True)
        if any(not 0 <= count <= total for count in counts):
            raise TeamNetError(f"{sizes}: a depth keeps 0 to {total} of them, found {counts}.")
    elif all(isinstance(item, list) for item in spec):
        return _depths_by_stage(stages, [item for item in spec if isinstance(item, list)], sizes)
    else:
        raise TeamNetError(
            f"Depths are a number, a list of block counts, or a list of block counts per stage "
            f"(such as [[3, 3], [2, 1]]); found {spec!r}."
        )
    order = drop_order(stages, policy)
    return _nested_depths(stages, [set(order[total - count :]) for count in counts], sizes)


def _depths_by_stage(stages: Sequence[int], spec: list[list[int]], sizes: str) -> tuple[Depth, ...]:
    for row in spec:
        fits = len(row) == len(stages) and all(
            0 <= kept <= size for kept, size in zip(row, stages, strict=True)
        )
        if not fits:
            raise TeamNetError(f"{sizes}; a depth cannot keep {row} of them.")
    starts = [sum(stages[:stage]) for stage in range(len(stages))]
    kept = [
        {start + i for start, count in zip(starts, row, strict=True) for i in range(count)}
        for row in sorted(spec, key=sum, reverse=True)
    ]
    return _nested_depths(stages, kept, sizes)


def _nested_depths(stages: Sequence[int], kept: list[set[int]], sizes: str) -> tuple[Depth, ...]:
    total = sum(stages)
    starts = [sum(stages[:stage]) for stage in range(len(stages) + 1)]
    depths = tuple(
        Depth(
            name=f"d{len(blocks)}",
            kept=tuple(index in blocks for index in range(total)),
            per_stage=tuple(len(blocks.intersection(range(*stage))) for stage in pairwise(starts)),
        )
        for blocks in kept
    )
    if len(depths) < 2:
        raise TeamNetError(
            f"{sizes}; an elastic net needs at least two depths, found {len(depths)}."
        )
    if depths[0].num_blocks != total:
        raise TeamNetError(
            f"{sizes}; the deepest depth must keep them all, found {list(depths[0].per_stage)}. "
            "Add the full depth, or use a smaller backbone."
        )
    for (deeper, deep_blocks), (shallower, blocks) in pairwise(zip(depths, kept, strict=True)):
        if not blocks < deep_blocks:
            raise TeamNetError(
                f"Depths must be nested, each keeping fewer of the next deeper one's blocks: "
                f"{list(shallower.per_stage)} does not fit inside {list(deeper.per_stage)}."
            )
    return depths

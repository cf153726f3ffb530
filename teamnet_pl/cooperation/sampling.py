"""The depths that a step of training runs, where it does not run all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teamnet_pl.cooperation.configs import TeammateConfig
from teamnet_pl.elastic import Depth


def depths_of_step(
    depths: Sequence[Depth], config: TeammateConfig, progress: float, draw: np.random.Generator
) -> list[Depth]:
    """Chooses the depths of one step.

    Args:
        depths: All depths that are trained, the deepest first.
        config: How many are drawn, and when they join.
        progress: Share of the training that is done, this step included.
        draw: The generator to draw with.

    Returns:
        The deepest and the shallowest depth that have joined and the drawn ones between them, the
        deepest first.

    Example:
        >>> from teamnet_pl.elastic import derive_depths
        >>> depths = derive_depths([4], 5)
        >>> config = TeammateConfig(sampled_depths=1, progressive=0.4)
        >>> for progress in (0.01, 0.2, 0.3, 0.9):
        ...     draw = np.random.default_rng(0)
        ...     print([str(depth) for depth in depths_of_step(depths, config, progress, draw)])
        ['d4']
        ['d4', 'd3', 'd2']
        ['d4', 'd2', 'd1']
        ['d4', 'd1', 'd0']
    """
    if config.progressive:
        joined = 1 + int(min(1.0, progress / config.progressive) * (len(depths) - 1))
        depths = depths[:joined]
    between = depths[1:-1]
    if config.sampled_depths is None or config.sampled_depths >= len(between):
        return list(depths)
    drawn = sorted(draw.choice(len(between), config.sampled_depths, replace=False))
    return [depths[0], *(between[index] for index in drawn), depths[-1]]

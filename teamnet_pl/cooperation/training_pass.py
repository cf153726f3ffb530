"""The forward pass of a step of training: the members that run, their depths and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from teamnet_pl.cooperation.configs import TeammateConfig
from teamnet_pl.cooperation.members import LEADER, member_logits
from teamnet_pl.cooperation.transfers import FeatureEdge, progress_since
from teamnet_pl.elastic import AdaptiveNet, Depth, DepthFeatures, ElasticNet
from teamnet_pl.elastic.features import modules_named, recorded
from teamnet_pl.errors import TeamNetError

_ALL_DEPTHS = TeammateConfig()


@dataclass
class MemberOutputs:
    """The outputs of the members that took part in a step.

    Attributes:
        logits: By the member's name, each ``(N, classes)``.
        features: By the member's name and the module's, each ``(N, ...)``.
    """

    logits: dict[str, Tensor]
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class TrainingPass:
    """Runs the members that take part in a step of training.

    Args:
        leader: The Leader, if there is one.
        teammates: The Teammates by name.
        configs: The configs of those Teammates that have one: which depths a step runs.
        leader_alone: Share of the training in which the Leader alone is trained.
        features: The modules whose features transfers teach.

    Raises:
        TeamNetError: If features are asked for of a net that is not elastic or has no such module.
    """

    def __init__(
        self,
        leader: nn.Module | None,
        teammates: Mapping[str, AdaptiveNet],
        configs: Mapping[str, TeammateConfig],
        leader_alone: float,
        features: FeatureEdge,
    ) -> None:
        self._leader = leader
        self._teammates = teammates
        self._configs = configs
        self._leader_alone = leader_alone if leader is not None else 0.0
        self._leader_modules: list[str] = []
        self._readers: dict[str, DepthFeatures] = {}
        if features.weight:
            self._leader_modules = [] if leader is None else modules_named(leader, features.modules)
            self._readers = {
                name: _reader(name, net, features.modules) for name, net in teammates.items()
            }

    @property
    def uses_all_weights(self) -> bool:
        """Whether each step runs all members at all depths."""
        return (
            not self._leader_alone
            and all(
                config.sampled_depths is None and not config.progressive
                for config in self._configs.values()
            )
            and all(net.training_depths() == net.depths for net in self._teammates.values())
        )

    def run(
        self, images: Tensor, progress: float, seed: Sequence[int], leader_learns: bool
    ) -> MemberOutputs:
        """Runs the members.

        Args:
            images: Shape ``(N, channels, height, width)``.
            progress: Share of the training that is done, this step included.
            seed: Numbers that the drawn depths depend on, the same in all processes.
            leader_learns: Whether the Leader's outputs have gradients.
        """
        outputs = self._run_leader(images, leader_learns)
        if progress <= self._leader_alone:
            return outputs
        progress = progress_since(self._leader_alone, progress)
        depths = {
            name: depths_of_step(
                net.training_depths(),
                self._configs.get(name, _ALL_DEPTHS),
                progress,
                np.random.default_rng([*seed, *name.encode()]),
            )
            for name, net in self._teammates.items()
        }
        with ExitStack() as stack:
            kept = {
                name: stack.enter_context(reader.recorded())
                for name, reader in self._readers.items()
            }
            outputs.logits |= member_logits(self._teammates, None, images, depths)
        for name, reader in self._readers.items():
            for depth, values in reader.by_depth(kept[name], depths[name]).items():
                outputs.features[f"{name}/{depth}"] = values
        return outputs

    def _run_leader(self, images: Tensor, learns: bool) -> MemberOutputs:
        if self._leader is None:
            return MemberOutputs({})
        with (
            nullcontext() if learns else torch.no_grad(),
            recorded(self._leader, self._leader_modules) as features,
        ):
            logits = member_logits({}, self._leader, images)
        return MemberOutputs(logits, {LEADER: features})


def _reader(name: str, net: AdaptiveNet, modules: Sequence[str]) -> DepthFeatures:
    if not isinstance(net, ElasticNet):
        raise TeamNetError(
            f"cooperation.features needs elastic nets, and {name} is a {type(net).__name__}: set "
            "its weight to 0."
        )
    return DepthFeatures(net, modules)


def depths_of_step(
    depths: Sequence[Depth], config: TeammateConfig, progress: float, draw: np.random.Generator
) -> list[Depth]:
    """Chooses the depths of one step.

    Args:
        depths: All depths that are trained, the deepest first.
        config: How many are drawn, and when they join.
        progress: Share of the Teammates' training that is done, this step included.
        draw: The generator to draw with.

    Returns:
        The deepest and the shallowest depth that have joined and the drawn ones between them, the
        deepest first.

    Examples:
        >>> from teamnet_pl.elastic import derive_depths
        >>> depths = derive_depths([4], 5)
        >>> config = TeammateConfig(sampled_depths=1, progressive=0.4)
        >>> for progress in (0.01, 0.2, 0.31, 0.9):
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

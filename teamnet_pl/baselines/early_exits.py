"""A net with exits."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from teamnet_pl.baselines.base import BaselineNet
from teamnet_pl.elastic import DepthLike, cost, costs_without_blocks
from teamnet_pl.elastic.discovery.find import siblings_of_blocks
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.features import recorded
from teamnet_pl.errors import TeamNetError


class EarlyExitNet(BaselineNet):
    """A backbone with a head behind some of its blocks: a shallow depth leaves it there.

    The deepest depth is the whole backbone. Each other one runs the backbone up to the block from
    where its MACs, with those of a head, come nearest to the elastic net's at this depth; no two
    depths leave at the same block. An exit may be behind any block, also one that cannot be
    skipped, such as the first of a stage; never before the first block.

    The head of feature maps halves their resolution to that of the last block's, each time by a 3x3
    convolution of stride 2 with batch norm and ReLU that widens them in proportion to the last
    block's channels, then averages them before a linear layer. That of tokens is a layer norm, the
    mean over the tokens and a linear layer.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``. It is not copied.
        input_shape: As of an `ElasticNet`, like all other arguments; see `BaselineNet`.

    Attributes:
        exits: The block behind which each depth but the deepest leaves, by the depth's name.
        heads: The heads by the depth's name.

    Raises:
        TeamNetError: As `BaselineNet`; or if too few blocks return feature maps or tokens, or
            `torch.fx` cannot cut the backbone there.

    Source: Kaya et al., "Shallow-Deep Networks" (arXiv 1810.07052), for exits at shares of the
        cost; Zhang et al., "Be Your Own Teacher" (arXiv 1905.08094), for their convolutions.

    Examples:
        >>> import torch, torchvision
        >>> net = EarlyExitNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> net.exits
        {'d2': 'layer2.1', 'd0': 'layer1.1'}
        >>> net.packed(torch.randn(2, 3, 32, 32)).shape
        torch.Size([3, 2, 10])
    """

    def _build(self) -> None:
        heads = self._possible_heads()
        names = list(heads)
        shallower = self.depths[:0:-1]  # the shallowest first, as the exits come
        if len(names) < len(shallower):
            raise TeamNetError(
                f"{type(self.backbone).__name__} has {len(names)} blocks that return feature maps "
                f"(N, C, H, W) or tokens (N, L, C), too few for exits at {len(shallower)} depths: "
                "ask for fewer depths."
            )
        macs = [
            cost(_UpTo(self.backbone, name, head), self.input_shape).macs
            for name, head in heads.items()
        ]
        elastic = costs_without_blocks(self.backbone, self.blocks, shallower, self.input_shape)
        chosen = nearest_in_order(macs, [cost.macs for cost in elastic])
        pairs = list(zip(shallower, chosen, strict=True))[::-1]
        self.exits = {depth.name: names[index] for depth, index in pairs}
        self.heads = nn.ModuleDict({depth.name: heads[names[index]] for depth, index in pairs})
        self._check_cuts()

    def _possible_heads(self) -> dict[str, nn.Module]:
        """A head for each block that an exit may be behind, in the order in which they run."""
        names = list(siblings_of_blocks(self.backbone, self.blocks))
        images = example_images(self.backbone, 2, self.input_shape)
        with evaluation(self.backbone), recorded(self.backbone, names) as outputs:
            classes = self.backbone(images).shape[-1]
        features = {name: values for name, values in outputs.items() if values.ndim in (3, 4)}
        *_, last = features.values() if features else [images]
        return {
            name: make_head(values, last, self.input_shape, classes).to(values)
            for name, values in features.items()
        }

    def _check_cuts(self) -> None:
        """Compares each exit with the net that is cut there."""
        images = example_images(self.backbone, 2, self.input_shape)
        for name in self.exits:
            with self.at(name), evaluation(self):
                expected = self(images)
            cut = self.extract(name)
            with evaluation(cut):
                same = torch.allclose(cut(images), expected, rtol=1e-3, atol=1e-5, equal_nan=True)
            if not same:
                raise TeamNetError(
                    f"{type(self.backbone).__name__} cannot have exits: cut behind "
                    f"{self.exits[name]} it returns other features there."
                )

    def _run(self, images: Tensor, index: int) -> Tensor:
        return self._leave(images, [index])[0]

    def _leave(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Runs the backbone once, as far as needed for the depths of some indices, in order."""
        names = [self.depths[index].name for index in reversed(indices) if index]
        heads = {self.exits[name]: self.heads[name] for name in names}
        return run_with_exits(self.backbone, images, heads, to_end=0 in indices)[::-1]

    def packed(self, images: Tensor, depths: Sequence[DepthLike] | None = None) -> Tensor:
        """Runs several depths, in one pass of the backbone.

        Args:
            images: Shape ``(N, channels, height, width)``.
            depths: The depths to run, the deepest first; all by default.

        Returns:
            Logits of each of these depths, shape ``(depths, N, classes)``.

        Raises:
            TeamNetError: If the net has no such depth, or the depths are not in order.
        """
        return torch.stack(self._leave(images, self._indices(depths)))

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A copy of the backbone for the deepest depth; for the others a `CutNet`.

        Raises:
            TeamNetError: If the net has no such depth, or `torch.fx` cannot cut the backbone.
        """
        name = self.depth(depth).name
        backbone = copy.deepcopy(self.backbone)
        if name not in self.exits:
            return backbone
        nodes = {self.exits[name]: CutNet.FEATURES}
        try:
            trunk = create_feature_extractor(backbone, nodes, suppress_diff_warning=True)
        except Exception as error:  # whatever a net raises for a symbolic tensor
            raise TeamNetError(
                f"{type(backbone).__name__} cannot have exits, since torch.fx cannot trace it "
                f"({error}): use a backbone without control flow that depends on features."
            ) from error
        return CutNet(trunk, copy.deepcopy(self.heads[name])).train(self.training)


class CutNet(nn.Module):
    """A backbone up to one of its blocks, and a head.

    Args:
        trunk: The backbone up to the block: returns a dictionary with the features.
        head: Maps features to logits.
    """

    FEATURES = "features"

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(N, channels, height, width)`` to logits ``(N, classes)``."""
        logits: Tensor = self.head(self.trunk(images)[self.FEATURES])
        return logits


class TokenMean(nn.Module):
    """The mean over all axes but the first and the last."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens ``(N, ..., channels)`` to features ``(N, channels)``."""
        return tokens.flatten(1, -2).mean(1)


def make_head(
    features: Tensor, last: Tensor, input_shape: Sequence[int], num_classes: int
) -> nn.Module:
    """Makes the head of an exit, see `EarlyExitNet`.

    Args:
        features: The features at the exit: ``(N, channels, height, width)``, ``(N, tokens,
            channels)`` or ``(N, height, width, channels)``.
        last: Those of the last block.
        input_shape: Shape of one image, ``(channels, height, width)``.
        num_classes: Number of classes.
    """
    if features.ndim == 3 or _is_channels_last(features, input_shape):
        channels = features.shape[-1]
        return nn.Sequential(nn.LayerNorm(channels), TokenMean(), nn.Linear(channels, num_classes))
    last = last if last.ndim == 4 else features  # tokens may follow feature maps
    channels, last_channels = features.shape[1], last.shape[1]
    halvings = max(0, round(math.log2(features.shape[2] / last.shape[2])))
    widths = [
        round(channels * (last_channels / channels) ** (step / max(1, halvings)))
        for step in range(halvings + 1)
    ]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pool, nn.Linear(widths[-1], num_classes))


def _is_channels_last(features: Tensor, input_shape: Sequence[int]) -> bool:
    """Whether the middle axes have the aspect ratio of an image, rather than the last two."""
    _, height, width = input_shape
    _, first, second, third = features.shape
    middle, end = (
        abs(math.log(a / b * width / height)) for a, b in ((first, second), (second, third))
    )
    return middle < end


def nearest_in_order(values: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Chooses for each target the index of the nearest value behind those chosen before.

    Args:
        values: At least as many as targets.
        targets: In the order of the values.

    Examples:
        >>> nearest_in_order([10, 20, 30, 40], [12, 13, 90])
        [0, 1, 3]
        >>> nearest_in_order([10, 20, 30], [90, 95, 99])  # leaves one for each that follows
        [0, 1, 2]
    """
    chosen: list[int] = []
    for number, target in enumerate(targets):
        first = chosen[-1] + 1 if chosen else 0
        end = len(values) - len(targets) + number + 1
        chosen.append(min(range(first, end), key=lambda index: abs(values[index] - target)))
    return chosen


def run_with_exits(
    backbone: nn.Module, images: Tensor, heads: Mapping[str, nn.Module], to_end: bool
) -> list[Tensor]:
    """Runs a backbone once, with heads behind some of its modules.

    Args:
        backbone: The net.
        images: Shape ``(N, channels, height, width)``.
        heads: By the name of the module, in the order in which they run, each once.
        to_end: Whether the backbone runs to its end, rather than to the last head.

    Returns:
        The logits of each head, and those of the backbone if it ran to its end.
    """
    logits: list[Tensor] = []

    def leave(head: nn.Module, _module: nn.Module, _args: Any, features: Tensor) -> None:
        logits.append(head(features))
        if len(logits) == len(heads) and not to_end:
            raise _LeftEarly

    handles = [
        backbone.get_submodule(name).register_forward_hook(partial(leave, head))
        for name, head in heads.items()
    ]
    try:
        logits.append(backbone(images))
    except _LeftEarly:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return logits


class _LeftEarly(Exception):  # noqa: N818 - not an error
    """Ends the pass of a backbone at its last exit."""


class _UpTo(nn.Module):
    """A backbone that is left behind one of its modules."""

    def __init__(self, backbone: nn.Module, name: str, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList([head])
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        heads = {self.name: self.heads[0]}
        return run_with_exits(self.backbone, images, heads, to_end=False)[0]

"""The base of the baselines: the depths of an elastic net, run one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from teamnet_pl.elastic import (
    AdaptiveNet,
    Block,
    DepthLike,
    DepthPolicy,
    DepthSpec,
    derive_depths,
    trace_backbone,
)
from teamnet_pl.elastic.forwards import Selection
from teamnet_pl.elastic.net import check_is_plain
from teamnet_pl.errors import TeamNetError


class BaselineNet(AdaptiveNet):
    """A net with the depths of the `ElasticNet` of the same arguments, made in another way.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``. It is not copied.
        input_shape: Shape of one image, ``(channels, height, width)``.
        depths: As of an `ElasticNet`.
        policy: As of an `ElasticNet`.
        interleaved: As of an `ElasticNet`.
        blocks: As of an `ElasticNet`.
        per_depth_affine: Only of an `ElasticNet`, refused here.
        grad_checkpointing: Only of an `ElasticNet`, refused here.

    Attributes:
        backbone: The backbone, which is the deepest depth.
        blocks: The skippable blocks, in the order in which they run.
        depths: The depths of the elastic net, the deepest first. This net has one for each, of
            about the same cost.

    Raises:
        TeamNetError: If an option has no meaning for the net, the backbone has no skippable blocks
            or is elastic already, or the depths do not fit it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_shape: Sequence[int],
        *,
        depths: DepthSpec = 4,
        policy: DepthPolicy = "last_stage_first",
        interleaved: bool = False,
        blocks: Sequence[str] | None = None,
        per_depth_affine: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        options = {"per_depth_affine": per_depth_affine, "grad_checkpointing": grad_checkpointing}
        for name, value in options.items():
            if value:
                raise TeamNetError(
                    f"{type(self).__name__} has no {name}, found {value}: leave it out, or use an "
                    "ElasticNet."
                )
        check_is_plain(backbone)
        trace = trace_backbone(backbone, input_shape, blocks)
        if not trace.returns_logits:
            raise TeamNetError(
                f"A {type(self).__name__} is of logits (N, classes), but {type(backbone).__name__} "
                "returns more, or something else, in training or evaluation. Switch off auxiliary "
                "heads and the like by the net's own options, or use an ElasticNet."
            )
        self.backbone = backbone
        self.input_shape = tuple(input_shape)
        self.blocks = trace.blocks
        self.depths = derive_depths(trace.stages, depths, policy, interleaved)
        self._selection = Selection()
        self._build()

    def _build(self) -> None:
        """Makes what the depths need besides the backbone."""

    @abstractmethod
    def _run(self, images: Tensor, index: int) -> Tensor:
        """Runs the depth of an index: images ``(N, ...)`` to logits ``(N, classes)``."""

    def _skipped_blocks(self, index: int) -> list[Block]:
        """Lists the blocks that the elastic net skips at the depth of an index."""
        kept = self.depths[index].kept
        return [block for block, flag in zip(self.blocks, kept, strict=True) if not flag]

    def models(self) -> list[nn.Module]:
        """Lists the backbone."""
        return [self.backbone]

    @contextmanager
    def at(self, depth: DepthLike) -> Iterator[BaselineNet]:
        """Runs the net at one depth within a ``with`` block.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Yields:
            This net.

        Raises:
            TeamNetError: If the net has no such depth.
        """
        with self._selection.at((self._index(depth),)):
            yield self

    def forward(self, images: Tensor) -> Tensor:
        """Runs one depth: the deepest, unless within `at`.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits, shape ``(N, classes)``.
        """
        return self._run(images, self._selection.depths[0])

    def packed(self, images: Tensor, depths: Sequence[DepthLike] | None = None) -> Tensor:
        """Runs several depths, one after the other.

        Args:
            images: Shape ``(N, channels, height, width)``.
            depths: The depths to run, the deepest first; by default all, in training mode
                `training_depths`.

        Returns:
            Logits of each of these depths, shape ``(depths, N, classes)``.

        Raises:
            TeamNetError: If the net has no such depth, or the depths are not in order.
        """
        return torch.stack([self._run(images, index) for index in self._indices(depths)])

"""One net trained with blocks dropped at random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from teamnet_pl.baselines.base import BaselineNet
from teamnet_pl.baselines.skipping import copy_without, skipping
from teamnet_pl.elastic import Depth, DepthLike


class LayerDropNet(BaselineNet):
    """One net whose blocks are dropped at random in training, and skipped by depth afterwards.

    In training each pass leaves out each skippable block with probability `drop_rate`, for the
    whole batch, by torch's global generator. A step trains the deepest depth only, see
    `training_depths`. In evaluation a depth skips its blocks and nothing is rescaled. All depths
    share one set of batch norm statistics.

    A block that is dropped has no gradient in that step, and each process draws its own blocks. A
    `Team` takes care of this; in a loop of your own DDP needs ``find_unused_parameters``.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``. It is not copied.
        input_shape: As of an `ElasticNet`, like all other arguments; see `BaselineNet`.

    Attributes:
        drop_rate: The probability with which a block is dropped.

    Source: Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout" (arXiv
        1909.11556); Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).

    Examples:
        >>> import torch, torchvision
        >>> net = LayerDropNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> net.packed(images).shape  # in training
        torch.Size([1, 2, 10])
        >>> net.eval().packed(images).shape
        torch.Size([3, 2, 10])
    """

    drop_rate: ClassVar[float] = 0.2

    def training_depths(self) -> tuple[Depth, ...]:
        """Lists the deepest depth alone."""
        return self.depths[:1]

    def _run(self, images: Tensor, index: int) -> Tensor:
        skipped = self._skipped_blocks(index)
        if self.training:
            is_dropped = (torch.rand(len(self.blocks)) < self.drop_rate).tolist()
            dropped = [block for block, flag in zip(self.blocks, is_dropped, strict=True) if flag]
            skipped += [block for block in dropped if block not in skipped]
        with skipping(self.backbone, skipped):
            logits: Tensor = self.backbone(images)
        return logits

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A copy of the backbone, of its own class, without the skipped blocks.

        Raises:
            TeamNetError: If the net has no such depth, or cannot do without the blocks.
        """
        skipped = self._skipped_blocks(self._index(depth))
        return copy_without(self.backbone, skipped, self.input_shape)

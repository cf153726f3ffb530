"""Nets trained apart."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from teamnet_pl.baselines.base import BaselineNet
from teamnet_pl.baselines.skipping import copy_without
from teamnet_pl.elastic import DepthLike


class SeparateNets(BaselineNet):
    """A plain net for each depth, with weights of its own.

    Each is the backbone without the blocks that its depth skips. All start from the same weights,
    those of the backbone, so that a comparison is paired and all profit alike from weights that
    were trained before; nothing is shared from then on. But a norm that gradients are clipped to is
    that of all nets together.

    Args:
        backbone: The deepest net. Maps images ``(N, *input_shape)`` to logits ``(N, classes)``. It
            is not copied.
        input_shape: As of an `ElasticNet`, like all other arguments; see `BaselineNet`.

    Attributes:
        shallower: The nets of the other depths by name.

    Examples:
        >>> import torch, torchvision
        >>> net = SeparateNets(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> list(net.shallower)
        ['d2', 'd0']
        >>> net.packed(torch.randn(2, 3, 32, 32)).shape
        torch.Size([3, 2, 10])
    """

    def _build(self) -> None:
        self.shallower = nn.ModuleDict()
        for index, depth in enumerate(self.depths[1:], 1):
            skipped = self._skipped_blocks(index)
            self.shallower[depth.name] = copy_without(self.backbone, skipped, self.input_shape)

    def models(self) -> list[nn.Module]:
        """Lists the nets, the deepest first."""
        return [self.backbone, *self.shallower.values()]

    def _run(self, images: Tensor, index: int) -> Tensor:
        logits: Tensor = self.models()[index](images)
        return logits

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies the net of one depth.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Raises:
            TeamNetError: If there is no such depth.
        """
        return copy.deepcopy(self.models()[self._index(depth)])

"""Residual nets for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from teamnet_pl.errors import TeamNetError


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110 for images of about 32², with a stem that does not downsample.

    Three stages of `torchvision.models.resnet.BasicBlock`; the first block of the second and third
    stage halves the resolution, with a projection as shortcut.

    Args:
        depth: Number of weighted layers, 6n + 2.
        num_classes: Number of classes.
        in_channels: Number of channels of the images.
        width: Number of channels of the first stage.

    Raises:
        TeamNetError: If the depth is not 6n + 2.

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), § 4.2.

    Examples:
        >>> net = CifarResNet(20, num_classes=10)
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        num_blocks, rest = divmod(depth - 2, 6)
        if rest or num_blocks < 1:
            raise TeamNetError(
                f"The depth of a CIFAR ResNet is 6n + 2 (20, 32, ...), found {depth}."
            )
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(width, width, num_blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, num_blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, num_blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(width_in: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(conv1x1(width_in, width, stride), nn.BatchNorm2d(width))
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(num_blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(N, in_channels, height, width)`` to logits ``(N, num_classes)``."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits

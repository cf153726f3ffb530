"""Wide residual nets for small images."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.resnet import conv1x1, conv3x3

from teamnet_pl.errors import TeamNetError


class WideBlock(nn.Module):
    """Two convolutions, each after a batch norm and a ReLU; nothing follows the addition."""

    def __init__(self, width_in: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = conv3x3(width_in, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(width, width)
        changes = stride > 1 or width_in != width
        self.shortcut = conv1x1(width_in, width, stride) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        """Maps features ``(N, width_in, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        active = F.relu(self.bn1(features))
        # A projection takes the activated features, an identity the features before activation.
        shortcut = features if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return shortcut + out


class WideResNet(nn.Module):
    """WRN-28-10 and similar nets for images of about 32².

    Args:
        depth: Number of weighted layers, 6n + 4.
        width: Factor of the number of channels over that of a ResNet for CIFAR.
        num_classes: Number of classes.
        in_channels: Number of channels of the images.
        dropout: Probability of dropout between the convolutions of a block.

    Raises:
        TeamNetError: If the depth is not 6n + 4.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146).

    Examples:
        >>> import torch
        >>> net = WideResNet(16, 4, num_classes=10)
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_blocks, rest = divmod(depth - 4, 6)
        if rest or num_blocks < 1:
            raise TeamNetError(
                f"The depth of a wide ResNet is 6n + 4 (16, 28, ...), found {depth}."
            )
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = _stage(num_blocks, 16, 16 * width, 1, dropout)
        self.layer2 = _stage(num_blocks, 16 * width, 32 * width, 2, dropout)
        self.layer3 = _stage(num_blocks, 32 * width, 64 * width, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(N, in_channels, height, width)`` to logits ``(N, num_classes)``."""
        features = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(F.relu(self.bn(features)).mean((2, 3)))
        return logits


def _stage(
    num_blocks: int, width_in: int, width: int, stride: int, dropout: float
) -> nn.Sequential:
    first = WideBlock(width_in, width, stride, dropout)
    return nn.Sequential(
        first, *(WideBlock(width, width, 1, dropout) for _ in range(num_blocks - 1))
    )

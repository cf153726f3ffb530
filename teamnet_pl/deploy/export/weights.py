"""One depth as a plain net, and its weights as a file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_model
from torch import nn

from teamnet_pl.elastic import DepthLike, ElasticNet


def plain_net(net: ElasticNet, depth: DepthLike) -> nn.Module:
    """Extracts one depth as a plain net on the CPU, in evaluation mode and without gradients.

    Raises:
        TeamNetError: If the net has no such depth, or cannot run without the skipped blocks.
    """
    return net.extract(depth).cpu().eval().requires_grad_(False)


def save_weights(net: ElasticNet, depth: DepthLike, path: str | Path) -> None:
    """Saves the weights of one depth for a plain net of just this depth.

    For a ResNet-50 that keeps 3, 4, 2 and 1 blocks this is the state dict of torchvision's
    ``ResNet(Bottleneck, [3, 4, 2, 1])``. `safetensors.torch.load_model` loads it strictly.

    Args:
        net: The net.
        depth: One of its depths.
        path: The safetensors file.

    Raises:
        TeamNetError: If the net has no such depth, or cannot run without the skipped blocks.
    """
    save_model(plain_net(net, depth), str(path))

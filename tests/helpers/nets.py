"""Small nets, elastic nets, and the plain nets that elastic nets are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.convnext import LayerNorm2d

from teamnet_pl.backbones import CifarResNet
from teamnet_pl.elastic import DepthLike, DepthSpec, ElasticNet

# Nets of the libraries, for images of 32² and 5 classes, by the layers of each stage

SHAPE = (3, 32, 32)
"""The shape of their images."""


def basic_resnet(layers: Sequence[int]) -> Any:
    """A ResNet of torchvision, with the blocks of ResNet-18 and -34."""
    return tv.ResNet(tv.resnet.BasicBlock, layers, num_classes=5)


def resnet(layers: Sequence[int]) -> Any:
    """A ResNet of torchvision, with bottlenecks as in ResNeXt-50."""
    return tv.ResNet(tv.resnet.Bottleneck, layers, num_classes=5, groups=4, width_per_group=2)


def convnext(layers: Sequence[int]) -> Any:
    """A ConvNeXt of timm."""
    return timm.models.ConvNeXt(depths=tuple(layers), dims=(8, 12, 16, 20), num_classes=5)


def torchvision_vit(layers: int) -> Any:
    """A vision transformer of torchvision."""
    return tv.VisionTransformer(32, 16, layers, 2, 16, 32, num_classes=5)


def swin(layers: Sequence[int], **kwargs: Any) -> Any:
    """A Swin transformer of torchvision."""
    heads = [2**stage for stage in range(len(layers))]
    return tv.SwinTransformer([4, 4], 8, layers, heads, [7, 7], num_classes=5, **kwargs)


def vit(layers: int) -> Any:
    """A vision transformer of timm."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=layers, num_heads=2, num_classes=5
    )


def cifar(width: int, layers: int = 20) -> CifarResNet:
    """A ResNet for CIFAR."""
    return CifarResNet(layers, num_classes=5, in_channels=3, width=width)


# A net of given blocks, for images of 8² and 5 classes, and its parts


class BlockNet(nn.Module):
    """Residual blocks with something before them and after the logits."""

    def __init__(
        self,
        between: nn.Module | None = None,
        blocks: Iterable[nn.Module] = (),
        after: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between or nn.Identity()
        self.blocks = nn.ModuleList([*blocks] or [Residual(), Residual()])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
        self.after = after or (lambda logits: logits)

    def forward(self, x: Tensor) -> Any:
        x = self.between(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.after(self.head(x))


class Residual(nn.Module):
    """A convolution and the given layers after it; nothing follows the addition."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv = nn.Sequential(conv, *layers) if layers else conv

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# Backbones of several kinds, with given stages and norm

WIDTH = 4
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 2),
    "layer": LayerNorm2d,
}


class PostActivation(nn.Module):
    """ReLU after the addition."""

    def __init__(self, norm: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = NORMS[norm](width)
        self.down = nn.Conv2d(channels, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.down(x)
        return F.relu(shortcut + self.norm(self.conv(x)))


class PreActivation(nn.Module):
    """Norm and ReLU before the convolution, nothing after the addition."""

    def __init__(self, norm: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm = NORMS[norm](channels)
        self.conv = nn.Conv2d(channels, width, 3, stride, 1)
        self.down = nn.Conv2d(channels, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.down(x)
        residual: Tensor = self.conv(F.relu(self.norm(x)))
        return shortcut + residual


class TinyResNet(nn.Module):
    """A ResNet; each stage is given as (number of blocks, whether the first one downsamples)."""

    def __init__(
        self,
        block: Callable[[str, int, int, int], nn.Module],
        stages: Sequence[tuple[int, bool]],
        norm: str,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        channels = WIDTH
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = NORMS[norm](channels)
        self.stages = nn.Sequential()
        for num_blocks, downsamples in stages:
            stage = nn.Sequential()
            for i in range(num_blocks):
                stride = 2 if downsamples and i == 0 else 1
                width = channels + 2 * (stride - 1)
                stage.append(block(norm, channels, width, stride))
                channels = width
            self.stages.append(stage)
        self.last_norm = NORMS[norm](channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(F.relu(self.last_norm(x)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Attention and an MLP, each with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1))
        return x + F.gelu(self.mlp(self.norm2(x)))


class TinyTransformer(nn.Module):
    """A transformer whose blocks are in a list, so that its own forward calls them."""

    def __init__(self, num_blocks: int, num_classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList(Attention(WIDTH) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


TWO_STAGES = ((2, False), (2, True))


def make_backbone(
    kind: str = "residual",
    stages: Sequence[tuple[int, bool]] = TWO_STAGES,
    norm: str = "batch",
    seed: int = 0,
) -> nn.Module:
    """A small backbone in float64, as if trained: no norm is at its initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: nn.Module
        if kind == "transformer":
            net = TinyTransformer(sum(num_blocks for num_blocks, _ in stages))
        else:
            block = {"residual": PostActivation, "preactivation": PreActivation}[kind]
            net = TinyResNet(block, stages, norm)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data /= 2  # so that nothing explodes with the number of blocks
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.get_buffer("running_mean"))
                nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return net.double()


def block_names(kind: str, stages: Sequence[tuple[int, bool]]) -> list[str]:
    """The blocks of `make_backbone` that can be skipped."""
    if kind == "transformer":
        return [f"blocks.{i}" for i in range(sum(num_blocks for num_blocks, _ in stages))]
    return [
        f"stages.{stage}.{i}"
        for stage, (num_blocks, downsamples) in enumerate(stages)
        for i in range(downsamples, num_blocks)
    ]


# Elastic nets


class Skipped(nn.Module):
    """Returns its first argument."""

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return features


def make_elastic(
    backbone: nn.Module, depths: DepthSpec, shape: tuple[int, int, int] = SHAPE, **kwargs: Any
) -> ElasticNet:
    """A net whose depths all differ, also in the statistics of their batch norms.

    Args:
        backbone: The backbone.
        depths: Its depths.
        shape: The shape of an image.
        **kwargs: Other arguments of the net.
    """
    net = ElasticNet(backbone, shape, depths=depths, **kwargs)
    train(net)
    return net.eval()


def plain_at(backbone: nn.Module, net: ElasticNet, depth: DepthLike) -> nn.Module:
    """The truth: a copy of a backbone in which the blocks that a depth skips do nothing.

    Args:
        backbone: A copy of the net's backbone, made before it became elastic.
        net: The elastic net.
        depth: One of its depths.
    """
    plain = copy.deepcopy(backbone)
    for block, kept in zip(net.blocks, net.depth(depth).kept, strict=True):
        if not kept:
            plain.set_submodule(block.name, Skipped())
    assert not any("forward" in vars(module) for module in plain.modules())
    return plain


def train(net: ElasticNet, steps: int = 2, batch_size: int = 3) -> None:
    """Takes a few packed steps, after which every depth has its own statistics."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(batch_size, *net.input_shape, generator=generator)
        optimizer.zero_grad()
        loss: Any = net.train().packed(images.to(next(net.parameters()))).square().mean()
        loss.backward()
        optimizer.step()


class Pair(nn.Module):
    """A residual block of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both features, each ``(N, 4, H, W)``."""
        return a + self.conv(b), b


class PairNet(nn.Module):
    """Two blocks of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Pair(), Pair()])
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(N, 3, H, W)`` to logits ``(N, 5)``."""
        a = b = self.stem(x)
        for block in self.blocks:
            a, b = block(a, b)
        logits: Tensor = self.head(a.mean((2, 3)))
        return logits

"""Small backbones, and the truth that elastic nets are held against."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.convnext import LayerNorm2d

from teamnet_pl.elastic import ElasticNet

WIDTH = 4
NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 2), "layer": LayerNorm2d}


class Residual(nn.Module):
    """ReLU after the addition."""

    def __init__(self, norm: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = NORMS[norm](width)
        self.down = nn.Conv2d(channels, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.down(x) + self.norm(self.conv(x)))


class PreActivation(nn.Module):
    """Norm and ReLU before the convolution, nothing after the addition."""

    def __init__(self, norm: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm = NORMS[norm](channels)
        self.conv = nn.Conv2d(channels, width, 3, stride, 1)
        self.down = nn.Conv2d(channels, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.down(x) + self.conv(F.relu(self.norm(x)))


class TinyResNet(nn.Module):
    """Stages are given as (blocks, whether the first one downsamples)."""

    def __init__(self, block: type[nn.Module], stages, norm: str, classes: int = 5) -> None:
        super().__init__()
        channels = WIDTH
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = NORMS[norm](channels)
        self.stages = nn.Sequential()
        for blocks, downsamples in stages:
            stage = nn.Sequential()
            for i in range(blocks):
                stride = 2 if downsamples and i == 0 else 1
                width = channels + 2 * (stride - 1)
                stage.append(block(norm, channels, width, stride))
                channels = width
            self.stages.append(stage)
        self.last_norm = NORMS[norm](channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.last_norm(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1))
        return x + F.gelu(self.mlp(self.norm2(x)))


class TinyTransformer(nn.Module):
    """Its blocks are in a list, so its own forward calls them."""

    def __init__(self, blocks: int, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList(Attention(WIDTH) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build(kind: str = "residual", stages=((2, False), (2, True)), norm: str = "batch", seed=0):
    """A small backbone in float64, as if trained: no norm is at its initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "transformer":
            net = TinyTransformer(sum(blocks for blocks, _ in stages))
        else:
            block = {"residual": Residual, "preactivation": PreActivation}[kind]
            net = TinyResNet(block, stages, norm)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data /= 2  # so that nothing explodes with the number of blocks
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return net.double()


def names_by_hand(kind: str, stages) -> list[str]:
    """The blocks of `build` that can be skipped."""
    if kind == "transformer":
        return [f"blocks.{i}" for i in range(sum(blocks for blocks, _ in stages))]
    return [
        f"stages.{s}.{i}" for s, (blocks, down) in enumerate(stages) for i in range(down, blocks)
    ]


class Skipped(nn.Module):
    """Hands its first argument on."""

    def forward(self, features, *args, **kwargs):
        return features


def by_hand(backbone: nn.Module, net: ElasticNet, depth) -> nn.Module:
    """The truth: a copy of a backbone in which the blocks that a depth skips do nothing."""
    plain = copy.deepcopy(backbone)
    for block, kept in zip(net.blocks, net.depth(depth).kept, strict=True):
        if not kept:
            plain.set_submodule(block.name, Skipped())
    assert not any(
        "forward" in vars(module) for module in plain.modules()
    )  # copied before wrapping
    return plain


def train(net: ElasticNet, steps: int = 2, shape=(3, 3, 8, 8)) -> None:
    """Some packed steps, after which every depth has statistics of its own."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for step in range(steps):
        images = torch.randn(*shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net.train().packed(images.to(next(net.parameters()))).square().mean().backward()
        optimizer.step()


@pytest.fixture(scope="session")
def toys():
    """What is in this file, for the tests beside it."""
    return SimpleNamespace(build=build, names_by_hand=names_by_hand, by_hand=by_hand, train=train)

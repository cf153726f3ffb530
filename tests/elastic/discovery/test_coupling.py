"""Layers that couple the samples of a batch run once per stream, or are refused."""

import copy

import pytest
import timm
import torch
from torch import nn

from teamnet_pl.elastic import ElasticNet, trace_backbone
from tests.helpers.nets import BlockNet, Lambda, Residual, plain_at

SHAPE = (3, 8, 8)


class CenterOnBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class CenterInTraining(nn.Module):
    """Has a running statistic but is not a batch norm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, 8, 8))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - x.mean(0)
        return x - self.mean


class GhostNorm(nn.BatchNorm2d):
    """Normalizes each half of the batch separately."""

    def forward(self, x):
        return torch.cat([super(GhostNorm, self).forward(half) for half in x.chunk(2)])


class AroundNorm(nn.Module):
    """Couples samples itself and through a batch norm inside it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x) - x.mean(0)


LAYERS = {
    "function": CenterOnBatch,
    "statistic": CenterInTraining,
    "ghost": lambda: GhostNorm(4),
    "around": AroundNorm,
    "evonorm": lambda: timm.layers.EvoNorm2dB0(4),
    "norm_act": lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
    "one_axis": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4), nn.Unflatten(2, (8, 8))),
    "three_axes": lambda: nn.Sequential(nn.Unflatten(3, (4, 2)), nn.BatchNorm3d(4), nn.Flatten(3)),
    "split": lambda: timm.layers.SplitBatchNorm2d(4, num_splits=2),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LAYERS.items()])
@pytest.mark.parametrize("training", [True, False])
def test_coupling_layers_run_for_each_depth_alone(make, training):
    torch.manual_seed(0)
    blocks = [Residual(make()), Residual(make(), nn.Conv2d(4, 4, 1)), Residual(make())]
    backbone = BlockNet(make(), blocks).double().train(training)
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=[3, 2, 0]).train(training)
    plain = [plain_at(pristine, net, depth) for depth in net.depths]
    for _ in range(2):  # statistics carry over from one pass to the next
        images = torch.randn(4, *SHAPE).double()
        packed, expected = net.packed(images), [plain_net(images) for plain_net in plain]
        torch.testing.assert_close(packed, torch.stack(expected), rtol=1e-10, atol=1e-10)
    packed.square().sum().backward()  # EvoNorm's own backward is in float32
    torch.stack(expected).square().sum().backward()
    gradient = sum(plain_net.stem.weight.grad for plain_net in plain)
    torch.testing.assert_close(backbone.stem.weight.grad, gradient, rtol=1e-5, atol=1e-5)
    for depth, plain_net in zip(net.depths, plain, strict=True):
        extracted = net.extract(depth)
        torch.testing.assert_close(list(extracted.buffers()), list(plain_net.buffers()))
        torch.testing.assert_close(extracted.eval()(images), plain_net.eval()(images))


def test_coupling_layers_are_found_where_they_are():
    blocks = [Residual(CenterOnBatch()), Residual(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))]
    trace = trace_backbone(BlockNet(AroundNorm(), blocks), SHAPE)
    assert sorted(trace.coupling) == [
        "between",
        "blocks.0.conv.1",
        "blocks.1.conv.1",
        "blocks.1.conv.2",
    ]


def test_coupling_that_zero_weights_hide():
    """As where the last layer of a residual branch is zero-initialized."""
    last = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(last.weight)
    blocks = [Residual(), Residual(CenterOnBatch(), last)]
    assert trace_backbone(BlockNet(blocks=blocks), SHAPE).coupling == ("blocks.1.conv.1",)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        Lambda(lambda x: x / x.flatten(1).norm(dim=1)[:, None, None, None]),
    ],
    ids=str,
)
def test_layers_that_do_not_couple(layer):
    assert trace_backbone(BlockNet(layer, [Residual(layer), Residual()]), SHAPE).coupling == ()


def test_layer_that_is_insensitive_to_the_sign_of_an_image():
    normed = Lambda(lambda images: images / images.norm())
    assert trace_backbone(nn.Sequential(normed, BlockNet()), SHAPE).coupling == ("0",)


# Refused


class TwoInputs(nn.Module):
    def forward(self, x, scale):
        return x - scale * x.mean(0)


class CallsWithTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = TwoInputs()

    def forward(self, x):
        return self.layer(x, 1.0)


class CenteredResidual(Residual):
    def forward(self, x):
        return x + self.conv(x).sub(self.conv(x).mean(0))


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (lambda: BlockNet(after=lambda logits: logits / logits.norm()), "The backbone"),
        (lambda: nn.Sequential(BlockNet(after=lambda x: x - x.mean(0))), "0"),
        (lambda: BlockNet(blocks=[Residual(), CenteredResidual()]), r"blocks\.1"),
        (lambda: BlockNet(CallsWithTwo()), r"between\.layer"),
    ],
)
def test_coupling_around_blocks_or_by_other_layers_is_refused(net, name):
    with pytest.raises(ValueError, match=rf"^{name} \(\w+\) couples the samples of a batch"):
        trace_backbone(net(), SHAPE)


class SequenceFirst(nn.Module):
    """Tokens of shape (tokens, N, width), as attention layers take by default."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(4, 2, 8, norm_first=True) for _ in range(2))
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize("width", [4, 8, 12])
def test_batch_axis_that_is_not_the_first(width):
    """The streams lie along the first axis."""
    with pytest.raises(ValueError, match=r"first axis of the output of blocks\.0 is not the batch"):
        trace_backbone(SequenceFirst(), (3, 8, width))


class Folded(BlockNet):
    """Folds quarters of the images into the batch axis, grouped by image or not."""

    def __init__(self, together):
        super().__init__()
        self.together = together

    def forward(self, x):
        x = self.stem(x).unflatten(2, (4, 2))  # N, C, 4, H / 4, W
        x = x.transpose(1, 2) if self.together else x.permute(2, 0, 1, 3, 4)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        x = x.unflatten(0, (-1, 4)) if self.together else x.unflatten(0, (4, -1)).transpose(0, 1)
        return self.head(x)


def test_images_that_are_folded_into_the_batch():
    backbone = Folded(together=True)
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=3)
    images = torch.randn(3, *SHAPE)
    expected = [plain_at(pristine, net, depth)(images) for depth in net.depths]
    torch.testing.assert_close(net.packed(images), torch.stack(expected))
    with pytest.raises(ValueError, match=r"first axis of the output of blocks\.0 is not the batch"):
        trace_backbone(Folded(together=False), SHAPE)


# Layers that run more than once


def test_layer_that_runs_at_two_places():
    norm = nn.BatchNorm2d(4)
    blocks = [Residual(norm), Residual(norm)]
    with pytest.raises(ValueError, match=r"conv\.1 runs in several places"):
        ElasticNet(BlockNet(blocks=blocks), SHAPE, depths=3)


def test_layer_that_runs_twice_in_one_block():
    norm = nn.BatchNorm2d(4)
    blocks = [Residual(norm, nn.ReLU(), norm), Residual()]
    net = ElasticNet(BlockNet(blocks=blocks), SHAPE, depths=3)
    assert [block.name for block in net.blocks] == ["blocks.0", "blocks.1"]

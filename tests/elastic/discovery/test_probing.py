"""Recorded calls of modules, and the blocks derived from them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from teamnet_pl.elastic import ElasticNet, trace_backbone
from tests.helpers.nets import BlockNet, Lambda, Residual, basic_resnet

SHAPE = (3, 8, 8)


def skippable(backbone, patterns=None):
    return [block.name for block in trace_backbone(backbone, SHAPE, patterns).blocks]


# Backbones that do not fit


def test_input_that_the_backbone_rejects():
    message = r"ResNet fails on images of shape \(1, 32, 32\) in evaluation: .* 3 channels"
    with pytest.raises(ValueError, match=message):
        trace_backbone(basic_resnet([1, 1, 1, 1]), (1, 32, 32))


def test_backbone_without_a_batch_in_its_outputs():
    backbone = BlockNet(after=lambda logits: logits.mean(0, keepdim=True))
    with pytest.raises(ValueError, match=r"first axis is the batch.*it returned \(1, 5\)"):
        trace_backbone(backbone, SHAPE)


@pytest.mark.parametrize(
    "after",
    [
        lambda x: (x, x),
        lambda x: {"logits": x},
        lambda x: x[..., None],
        lambda x: x.mean(1),
    ],
)
def test_outputs_that_are_not_logits_are_told(after):
    assert trace_backbone(BlockNet(), SHAPE).returns_logits
    assert not trace_backbone(BlockNet(after=after), SHAPE).returns_logits


class DiffersInTraining(BlockNet):
    def forward(self, x):
        logits = super().forward(x)
        return self.in_training(logits) if self.training else logits


@pytest.mark.parametrize(
    ("in_training", "message"),
    [
        (lambda logits: None, r"returned NoneType in training"),
        (lambda logits: logits.view(7, 7), r"fails on images of shape \(3, 8, 8\) in training"),
    ],
)
def test_backbone_that_behaves_differently_in_training(in_training, message):
    net = DiffersInTraining()
    net.in_training = in_training
    with pytest.raises(ValueError, match=message):
        trace_backbone(net, SHAPE)


class DropsInTraining(BlockNet):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return self.head(x if self.training else self.blocks[1](x))


def test_blocks_that_differ_in_training():
    with pytest.raises(ValueError, match="In training DropsInTraining runs its blocks as"):
        trace_backbone(DropsInTraining(), SHAPE)


# How blocks are called


class Calls(BlockNet):
    """Calls its blocks by a given function."""

    def __init__(self, call, *blocks):
        super().__init__(blocks=blocks)
        self.call = call

    def forward(self, x):
        first = x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x, first)
        return self.head(x)


class AddsTo(Residual):
    """Adds a term that also depends on its other arguments."""

    def forward(self, x, first=0, scale=1.0, negative=False):
        return x + (-scale if negative else scale) * self.conv(x + first)


class AddsToTwo(Residual):
    def forward(self, x, other, size=None):
        x = x + self.conv(other)
        return (x, other + self.conv(x)) if size is None else (x, other, size)


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    ("call", "block", "passthrough"),
    [
        (lambda block, x, first: block(x), Residual, 0),
        (lambda block, x, first: block(x, first), AddsTo, 0),  # another batch
        (lambda block, x, first: block(x, first=first), AddsTo, 0),
        (lambda block, x, first: block(x, x[0]), AddsTo, 0),  # without batch axis
        (lambda block, x, first: block(x, first=x.new_ones(1, 4, 1, 1)), AddsTo, 0),
        (lambda block, x, first: block(x, first, 0.5, negative=True), AddsTo, 0),
        (lambda block, x, first: sum(block(x, first)), AddsToTwo, 2),
        (lambda block, x, first: block(x, first, (8, 8))[0], AddsToTwo, 3),
    ],
)
def test_calls(call, block, passthrough):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = Calls(call, block(), block(), block()).double()
    trace = trace_backbone(backbone, SHAPE)
    assert [(b.name, b.passthrough) for b in trace.blocks] == [
        (f"blocks.{i}", passthrough) for i in range(3)
    ]
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=[3, 1, 0])
    images = torch.randn(2, 3, 8, 8).double()
    expected = []
    for depth in net.depths:
        plain = copy.deepcopy(pristine)
        plain.call = lambda b, x, first, depth=depth, plain=plain: (
            call(b, x, first)
            if depth.kept[list(plain.blocks).index(b)]
            else call(lambda *args, **_: args[:passthrough] if passthrough else args[0], x, first)
        )
        expected.append(plain(images))
    packed = net.packed(images)
    torch.testing.assert_close(packed, torch.stack(expected))
    packed.square().sum().backward()
    gradient = backbone.stem.weight.grad.clone()
    backbone.stem.weight.grad = None
    for depth, logits in zip(net.depths, expected, strict=True):
        with net.at(depth):
            torch.testing.assert_close(net(images), logits)
            net(images).square().sum().backward()
    torch.testing.assert_close(gradient, backbone.stem.weight.grad)


class KnowsBatchSize(Residual):
    def forward(self, x, count):
        return x + self.conv(x.view(count, 4, 8, 8))


@pytest.mark.parametrize(
    ("call", "block"),
    [
        (lambda block, x, first: block(x=x), Residual),  # by keyword
        (lambda block, x, first: block(x, len(x)), KnowsBatchSize),
        (lambda block, x, first: block(x)[0], lambda: Lambda(lambda x: (x, x.sum()))),
    ],
)
def test_block_that_is_called_in_a_way_that_cannot_be_skipped(call, block):
    with pytest.raises(ValueError, match="no residual block"):
        trace_backbone(Calls(call, block(), block()), SHAPE)
    with pytest.raises(ValueError, match="keeps its input's shape"):
        trace_backbone(Calls(call, block(), block()), SHAPE, ["blocks.*"])


def test_block_that_is_called_with_more_values_than_before():
    backbone = Calls(lambda block, x, first: block(x, first), AddsTo(), AddsTo())
    net = ElasticNet(backbone, SHAPE, depths=2)
    backbone.call = lambda block, x, first: block(x, first, 0.5)
    with pytest.raises(ValueError, match=r"AddsTo is called with 3 values, but with 2"):
        net.packed(torch.randn(2, 3, 8, 8))


def test_block_that_runs_twice():
    twice = Residual()
    assert skippable(BlockNet(blocks=[twice, Residual(), twice])) == ["blocks.1"]
    with pytest.raises(ValueError, match=r"runs once \(blocks\.0 run again\)"):
        trace_backbone(BlockNet(blocks=[twice, twice]), SHAPE)
    with pytest.raises(ValueError, match=r"runs once matches 'blocks\.0'\. There are: .*blocks\.1"):
        trace_backbone(BlockNet(blocks=[twice, Residual(), twice]), SHAPE, ["blocks.0"])


class RunsByBatchSize(BlockNet):
    def forward(self, x):
        x = self.stem(x)
        for block in [*self.blocks][: len(x)]:
            x = block(x)
        return self.head(x)


def test_backbone_that_runs_more_for_more_images():
    with pytest.raises(ValueError, match=r"runs \d+ modules for 2 images and \d+ for 4"):
        trace_backbone(RunsByBatchSize(blocks=[Residual() for _ in range(4)]), SHAPE)


# Residual blocks


class Merged(nn.Module):
    """As in RepVGG in training: the shortcut has a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.conv(x) + self.point(x) + self.identity(x))


class ScaledShortcut(Residual):
    """As in CAFormer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.9)[:, 0, 0])

    def forward(self, x):
        return self.scale[:, None, None] * x + self.conv(x)


class Activated(Residual):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return self.activation(super().forward(x))


class Gated(Residual):
    def forward(self, x):
        return x * torch.sigmoid(self.conv(x))


@pytest.mark.parametrize(
    "block",
    [
        Merged,
        ScaledShortcut,
        *(partial(Activated, a) for a in (nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Hardswish())),
    ],
)
def test_residual_blocks(block):
    net = BlockNet(nn.ReLU(), blocks=[block(), block()])
    assert skippable(net) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "block",
    [
        Gated,
        partial(Activated, nn.Sigmoid()),
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
    ],
)
def test_blocks_that_are_not_residual(block):
    with pytest.raises(ValueError, match="no residual block"):
        trace_backbone(BlockNet(blocks=[block(), block()]), SHAPE)


# Blocks that write into their input


class AddInPlace(Residual):
    def forward(self, x):
        x += self.conv(x)
        return x


class ReluInPlace(Residual):
    def forward(self, x):
        out = self.conv(F.relu_(x))
        return x + out


class ViewInPlace(Residual):
    def forward(self, x):
        x[:, :2].add_(self.conv(x)[:, :2])
        return x.clone()


@pytest.mark.parametrize("block", [AddInPlace, ReluInPlace, ViewInPlace])
def test_block_that_modifies_its_input_is_not_picked(block):
    def net(*blocks):
        return BlockNet(nn.ReLU(), blocks=blocks)  # so that none of the inputs are negative

    assert skippable(net(Residual(), block(), Residual())) == ["blocks.0", "blocks.2"]
    with pytest.raises(ValueError, match="no residual block"):
        trace_backbone(net(block(), block()), SHAPE)
    with pytest.raises(ValueError, match=r"There are: .*blocks\.1"):
        trace_backbone(net(block(), Residual()), SHAPE, ["blocks.0"])


def test_layer_that_works_in_place_on_its_own_output_is_fine():
    block = Residual()
    block.conv = nn.Sequential(block.conv, nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    assert skippable(BlockNet(blocks=[block])) == ["blocks.0"]


@pytest.mark.parametrize("stem", [nn.Identity(), nn.ReLU()])
@pytest.mark.parametrize("zeros", [False, True])
def test_activation_with_parameters_is_not_a_block(stem, zeros):
    block = Residual()
    block.conv = nn.Sequential(block.conv, nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 4, 1))
    if zeros:
        nn.init.zeros_(block.conv[1].weight)
    assert skippable(BlockNet(stem, blocks=[block, Residual()])) == [
        "blocks.0",
        "blocks.1",
    ]


# The backbone is left unchanged


@pytest.mark.parametrize("training", [True, False])
def test_probing_leaves_no_trace(training):
    dropped = Residual()
    dropped.conv = nn.Sequential(dropped.conv, nn.BatchNorm2d(4), nn.Dropout(0.5))
    net = BlockNet(nn.BatchNorm2d(4), blocks=[dropped, Residual()]).train(training)
    net.blocks[1].train(not training)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()

    trace_backbone(net, SHAPE)

    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    for module in net.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random), "the random state has moved on"


def test_the_result_does_not_depend_on_the_mode():
    net = BlockNet(nn.BatchNorm2d(4))
    assert trace_backbone(net.train(), SHAPE) == trace_backbone(net.eval(), SHAPE)

import copy
from functools import partial

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F  # noqa: N812

from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.blocks import trace

SHAPE = (3, 32, 32)


def skippable(backbone, shape=SHAPE, patterns=None):
    return [block.name for block in trace(backbone, shape, patterns).blocks]


NETS = {
    "resnet18": (tv.resnet18, "BasicBlock", [2, 1, 1, 1]),
    "resnet50": (tv.resnet50, "Bottleneck", [2, 3, 5, 2]),
    "efficientnet_b0": (tv.efficientnet_b0, "MBConv", [1, 1, 2, 2, 3]),
    "mobilenet_v3_large": (tv.mobilenet_v3_large, "InvertedResidual", [1, 1, 2, 3, 1, 2]),
    "vit_thin": (
        lambda: tv.VisionTransformer(32, 16, 12, 2, 16, 32),
        "EncoderBlock",
        [12],
    ),
    "swin_thin": (
        lambda: tv.SwinTransformer([4, 4], 8, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7]),
        "SwinTransformerBlock",
        [2, 2, 6, 2],
    ),
    "resnet18_zero_init": (
        lambda: tv.resnet18(zero_init_residual=True),
        "BasicBlock",
        [2, 1, 1, 1],
    ),
    # Of its own accord zero-initialised, with more layers behind the zeros.
    "timm_seresnet18": (
        lambda: timm.create_model("seresnet18"),
        "BasicBlock",
        [2, 1, 1, 1],
    ),
    "timm_vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
        "Block",
        [12],
    ),
    "timm_convnext_atto": (
        lambda: timm.create_model("convnext_atto"),
        "ConvNeXtBlock",
        [2, 2, 6, 2],
    ),
}
LARGE_NETS = {
    "convnext_tiny": (tv.convnext_tiny, "CNBlock", [3, 3, 9, 3]),
    "vit_b_16": (lambda: tv.vit_b_16(image_size=32), "EncoderBlock", [12]),
    "swin_t": (tv.swin_t, "SwinTransformerBlock", [2, 2, 6, 2]),
}


@pytest.mark.parametrize(
    ("make", "kind", "stages"),
    [
        *(pytest.param(*net, id=name) for name, net in NETS.items()),
        *(pytest.param(*net, id=name, marks=pytest.mark.slow) for name, net in LARGE_NETS.items()),
    ],
)
def test_known_nets(make, kind, stages):
    net = make()
    found = trace(net, SHAPE)
    # Never a stage, never a layer inside of a block.
    kinds = [type(net.get_submodule(block.name)).__name__ for block in found.blocks]
    assert set(kinds) == {kind}
    if hasattr(net.get_submodule(found.blocks[0].name), "use_res_connect"):
        assert [block.name for block in found.blocks] == [
            name for name, module in net.named_modules() if getattr(module, "use_res_connect", 0)
        ]
    assert found.stages == stages


@pytest.mark.parametrize("kind", ["residual", "preactivation", "transformer"])
@pytest.mark.parametrize("stages", [[(1, False)], [(2, True)], [(3, False), (1, True), (2, True)]])
def test_tiny_nets(toys, kind, stages):
    assert skippable(toys.build(kind, stages), (3, 8, 8)) == toys.names_by_hand(kind, stages)


def test_blocks_have_names_and_stages():
    found = trace(tv.resnet18(), SHAPE)
    assert [(block.name, block.stage) for block in found.blocks] == [
        ("layer1.0", 0),
        ("layer1.1", 0),
        ("layer2.1", 1),
        ("layer3.1", 2),
        ("layer4.1", 3),
    ]


@pytest.mark.parametrize("make", [tv.alexnet, partial(tv.vgg11_bn, init_weights=False)])
def test_nets_without_residual_blocks(make):
    with pytest.raises(ValueError, match=r"^(AlexNet|VGG) has no residual block.*patterns"):
        trace(make(num_classes=4), (3, 64, 64))


# Patterns


def resnet(layers):
    return tv.ResNet(tv.resnet.BasicBlock, layers)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["layer1.*"], ["layer1.0", "layer1.1"]),
        (["layer2.1", "layer1.0"], ["layer1.0", "layer2.1"]),
        (["layer[12].1"], ["layer1.1", "layer2.1"]),
        (["layer1"], ["layer1"]),
        (["layer1.0.conv2"], ["layer1.0.conv2"]),
        # layer2.0 downsamples; that does not turn the layers inside of it into blocks.
        (["layer2.*"], ["layer2.1"]),
        (["layer1.*", "layer2.*"], ["layer1.0", "layer1.1", "layer2.1"]),
    ],
)
def test_patterns(patterns, names):
    assert skippable(resnet([2, 2, 1, 1]), patterns=patterns) == names


def test_pattern_need_not_be_of_a_residual_block():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 5),
    )
    net = ElasticNet(plain, (3, 8, 8), blocks=["[12]"], depths=3)
    images = torch.randn(2, 3, 8, 8)
    expected = [nn.Sequential(*kept)(images) for kept in (plain, [*plain[:2], *plain[3:]])]
    torch.testing.assert_close(net.packed(images)[:2], torch.stack(expected))


@pytest.mark.parametrize("pattern", ["layer9.*", "layer2.0", "relu"])
def test_wrong_pattern_lists_what_there_is(pattern):
    with pytest.raises(
        ValueError, match=r"matches '.*'\. There are: .*layer1\.0, .*layer2\.1"
    ) as e:
        trace(resnet([1, 2, 1, 1]), SHAPE, ["layer1.0", pattern])
    assert repr(pattern) in str(e.value)
    assert "layer2.0," not in str(e.value)


# Backbones that do not fit


def test_input_that_the_backbone_rejects():
    message = r"ResNet fails on images of shape \(1, 32, 32\) in evaluation: .* 3 channels"
    with pytest.raises(ValueError, match=message):
        trace(resnet([1, 1, 1, 1]), (1, 32, 32))


class Around(nn.Module):
    """Residual blocks with something done in between."""

    def __init__(self, between=None, blocks=(), after=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between or nn.Identity()
        self.blocks = nn.ModuleList([*blocks] or [Add(), Add()])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
        self.after = after or (lambda logits: logits)

    def forward(self, x):
        x = self.between(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.after(self.head(x))


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("after", "returned"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: {"logits": x}, "dict"),
        (lambda x: x[..., None], r"\(2, 5, 1\)"),
        (lambda x: x.mean(1), r"\(2,\)"),
        (lambda x: x.mean(0, keepdim=True), r"\(1, 5\)"),
    ],
)
def test_backbone_without_logits(after, returned):
    with pytest.raises(ValueError, match=rf"must return logits.*returned {returned}"):
        trace(Around(after=after), (3, 8, 8))


class DiffersInTraining(Around):
    def forward(self, x):
        logits = super().forward(x)
        return self.in_training(logits) if self.training else logits


@pytest.mark.parametrize(
    ("in_training", "message"),
    [
        (lambda logits: (logits, logits), r"returned tuple in training"),  # with auxiliary heads
        (lambda logits: logits.view(7, 7), r"fails on images of shape \(3, 8, 8\) in training"),
    ],
)
def test_backbone_that_is_another_in_training(in_training, message):
    net = DiffersInTraining()
    net.in_training = in_training
    with pytest.raises(ValueError, match=message):
        trace(net, (3, 8, 8))


class DropsInTraining(Around):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return self.head(x if self.training else self.blocks[1](x))


def test_blocks_that_differ_in_training():
    with pytest.raises(ValueError, match="In training DropsInTraining runs its blocks as"):
        trace(DropsInTraining(), (3, 8, 8))


# How blocks are called


class Calls(Around):
    """Calls its blocks in some way."""

    def __init__(self, call, *blocks):
        super().__init__(blocks=blocks)
        self.call = call

    def forward(self, x):
        first = x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x, first)
        return self.head(x)


class AddsTo(Add):
    """Adds a part of itself, which is made of something else, too."""

    def forward(self, x, first=0, scale=1.0, negative=False):
        return x + (-scale if negative else scale) * self.conv(x + first)


class AddsToTwo(Add):
    def forward(self, x, other, size=None):
        x = x + self.conv(other)
        return (x, other + self.conv(x)) if size is None else (x, other, size)


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    ("call", "block", "hands_on"),
    [
        (lambda block, x, first: block(x), Add, 0),
        (lambda block, x, first: block(x, first), AddsTo, 0),  # another batch
        (lambda block, x, first: block(x, first=first), AddsTo, 0),
        (lambda block, x, first: block(x, x[0]), AddsTo, 0),  # without batch axis
        (lambda block, x, first: block(x, first=x.new_ones(1, 4, 1, 1)), AddsTo, 0),
        (lambda block, x, first: block(x, first, 0.5, negative=True), AddsTo, 0),
        (lambda block, x, first: sum(block(x, first)), AddsToTwo, 2),
        (lambda block, x, first: block(x, first, (8, 8))[0], AddsToTwo, 3),
    ],
)
def test_calls(toys, call, block, hands_on):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = Calls(call, block(), block(), block()).double()
    found = trace(backbone, (3, 8, 8))
    assert [(b.name, b.hands_on) for b in found.blocks] == [
        (f"blocks.{i}", hands_on) for i in range(3)
    ]
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, (3, 8, 8), depths=[3, 1, 0])
    images = torch.randn(2, 3, 8, 8).double()
    expected = []
    for depth in net.depths:
        plain = copy.deepcopy(pristine)
        plain.call = lambda b, x, first, depth=depth, plain=plain: (
            call(b, x, first)
            if depth.kept[list(plain.blocks).index(b)]
            else call(lambda *args, **_: args[:hands_on] if hands_on else args[0], x, first)
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


class KnowsBatchSize(Add):
    def forward(self, x, count):
        return x + self.conv(x.view(count, 4, 8, 8))


@pytest.mark.parametrize(
    ("call", "block"),
    [
        (lambda block, x, first: block(x=x), Add),  # by keyword
        (lambda block, x, first: block(x, len(x)), KnowsBatchSize),
        (lambda block, x, first: block(x)[0], lambda: Lambda(lambda x: (x, x.sum()))),
    ],
)
def test_block_that_is_called_in_a_way_that_cannot_be_skipped(call, block):
    with pytest.raises(ValueError, match="no residual block"):
        trace(Calls(call, block(), block()), (3, 8, 8))
    with pytest.raises(ValueError, match="keeps its input's shape"):
        trace(Calls(call, block(), block()), (3, 8, 8), ["blocks.*"])


def test_block_that_is_called_with_more_than_before():
    backbone = Calls(lambda block, x, first: block(x, first), AddsTo(), AddsTo())
    net = ElasticNet(backbone, (3, 8, 8), depths=2)
    backbone.call = lambda block, x, first: block(x, first, 0.5)
    with pytest.raises(ValueError, match=r"AddsTo is called with 3 values, but with 2"):
        net.packed(torch.randn(2, 3, 8, 8))


def test_block_that_runs_twice():
    twice = Add()
    assert skippable(Around(blocks=[twice, Add(), twice]), (3, 8, 8)) == ["blocks.1"]
    with pytest.raises(ValueError, match=r"runs once \(blocks\.0 run again\)"):
        trace(Around(blocks=[twice, twice]), (3, 8, 8))
    with pytest.raises(ValueError, match=r"runs once matches 'blocks\.0'\. There are: .*blocks\.1"):
        trace(Around(blocks=[twice, Add(), twice]), (3, 8, 8), ["blocks.0"])


class RunsByBatchSize(Around):
    def forward(self, x):
        x = self.stem(x)
        for block in [*self.blocks][: len(x)]:
            x = block(x)
        return self.head(x)


def test_backbone_that_runs_more_for_more_images():
    with pytest.raises(ValueError, match=r"runs \d+ modules for 2 images and \d+ for 4"):
        trace(RunsByBatchSize(blocks=[Add() for _ in range(4)]), (3, 8, 8))


# What is residual


class Merged(nn.Module):
    """As RepVGG in training: the shortcut has a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.conv(x) + self.point(x) + self.identity(x))


class ScaledShortcut(Add):
    """As CAFormer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.9)[:, 0, 0])

    def forward(self, x):
        return self.scale[:, None, None] * x + self.conv(x)


class Activated(Add):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return self.activation(super().forward(x))


class Gated(Add):
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
    net = Around(nn.ReLU(), blocks=[block(), block()])
    assert skippable(net, (3, 8, 8)) == ["blocks.0", "blocks.1"]


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
        trace(Around(blocks=[block(), block()]), (3, 8, 8))


# Blocks in blocks


def layers():
    return nn.Sequential(Add(), Add())


class Parts(nn.Module):
    """Two residual parts, which make a block."""

    def __init__(self):
        super().__init__()
        self.mixer, self.mlp = Add(), Add()

    def forward(self, x):
        return self.mlp(self.mixer(x))


class OwnWeights(Add):
    """A block that has a residual layer inside of it."""

    def __init__(self):
        super().__init__()
        self.encoding1, self.encoding2 = Add(), Add()

    def forward(self, x):
        x = self.encoding1(x)
        return self.encoding2(super().forward(x))


class Stage(nn.Module):
    """Numbered blocks, and something of its own."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4, 8, 8))
        self.blocks = nn.Sequential(Parts(), Parts())

    def forward(self, x):
        return self.blocks(x + self.position)


class InSomething(nn.Module):
    """A residual layer within a module that is not residual."""

    def __init__(self):
        super().__init__()
        self.part = Add()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.part(x))


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ([Parts, Parts], ["0", "1"]),
        ([OwnWeights, OwnWeights], ["0", "1"]),
        ([layers, layers], ["0.0", "0.1", "1.0", "1.1"]),
        ([lambda: nn.Sequential(Parts())], ["0.0"]),
        ([Stage, Stage], [f"{s}.blocks.{i}" for s in (0, 1) for i in (0, 1)]),
        ([InSomething, Parts], ["1"]),
        ([InSomething, InSomething], ["0.part", "1.part"]),  # there is nothing better
    ],
)
def test_nested_blocks(blocks, names):
    found = trace(Around(blocks=[make() for make in blocks]), (3, 8, 8))
    assert [block.name for block in found.blocks] == [f"blocks.{name}" for name in names]


def test_rows_of_single_layers_are_left_out():
    """As positional encodings."""
    stem = nn.Sequential(Add(), Add())
    assert skippable(Around(stem, blocks=[Parts(), Parts()]), (3, 8, 8)) == ["blocks.0", "blocks.1"]
    assert skippable(Around(stem, blocks=[Parts(), Add()]), (3, 8, 8)) == ["blocks.0", "blocks.1"]


def test_blocks_with_a_container_each_are_one_stage():
    wrapped = [nn.Sequential(Add(), nn.Conv2d(4, 4, 1)) for _ in range(3)]
    found = trace(Around(blocks=wrapped), (3, 8, 8))
    assert [block.name for block in found.blocks] == [f"blocks.{i}.0" for i in range(3)]
    assert found.stages == [3]


# Blocks that write into their input


class AddInPlace(Add):
    def forward(self, x):
        x += self.conv(x)
        return x


class ReluInPlace(Add):
    def forward(self, x):
        out = self.conv(F.relu_(x))
        return x + out


class ViewInPlace(Add):
    def forward(self, x):
        x[:, :2].add_(self.conv(x)[:, :2])
        return x.clone()


@pytest.mark.parametrize("block", [AddInPlace, ReluInPlace, ViewInPlace])
def test_block_that_modifies_its_input_is_not_picked(block):
    def net(*blocks):
        return Around(nn.ReLU(), blocks=blocks)  # so that none of the inputs are negative

    assert skippable(net(Add(), block(), Add()), (3, 8, 8)) == ["blocks.0", "blocks.2"]
    with pytest.raises(ValueError, match="no residual block"):
        trace(net(block(), block()), (3, 8, 8))
    with pytest.raises(ValueError, match=r"There are: .*blocks\.1"):
        trace(net(block(), Add()), (3, 8, 8), ["blocks.0"])


def test_layer_that_works_in_place_on_its_own_output_is_fine():
    block = Add()
    block.conv = nn.Sequential(block.conv, nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    assert skippable(Around(blocks=[block]), (3, 8, 8)) == ["blocks.0"]


@pytest.mark.parametrize("stem", [nn.Identity(), nn.ReLU()])
@pytest.mark.parametrize("zeros", [False, True])
def test_activation_with_parameters_is_not_a_block(stem, zeros):
    block = Add()
    block.conv = nn.Sequential(block.conv, nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 4, 1))
    if zeros:
        nn.init.zeros_(block.conv[1].weight)
    assert skippable(Around(stem, blocks=[block, Add()]), (3, 8, 8)) == ["blocks.0", "blocks.1"]


# The backbone stays as it is


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_mark(training):
    dropped = Add()
    dropped.conv = nn.Sequential(dropped.conv, nn.BatchNorm2d(4), nn.Dropout(0.5))
    net = Around(nn.BatchNorm2d(4), blocks=[dropped, Add()]).train(training)
    net.blocks[1].train(not training)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()

    trace(net, (3, 8, 8))

    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    for module in net.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random), "the random state has moved on"


def test_the_result_does_not_depend_on_the_mode():
    net = Around(nn.BatchNorm2d(4))
    assert trace(net.train(), (3, 8, 8)) == trace(net.eval(), (3, 8, 8))


def test_backbone_with_a_forward_of_its_own(toys):
    """As timm's FasterNet has."""

    def own(x):
        return 2 * Add.forward(block, x)

    block = Add()
    block.forward = own
    net = ElasticNet(Around(blocks=[Add(), block]), (3, 8, 8), depths=[2, 0], blocks=["blocks.*"])
    images = torch.randn(2, 3, 8, 8)
    x = net.backbone.stem(images)
    x = x + net.backbone.blocks[0].conv(x)
    expected = net.backbone.head(2 * (x + block.conv(x)))
    torch.testing.assert_close(net.packed(images)[0], expected)
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(net.extract(2)(images), expected)
    assert net.extract(2).blocks[1].forward is own


def test_backbone_that_is_elastic_already():
    backbone = resnet([1, 1, 1, 1])
    net = ElasticNet(backbone, SHAPE, depths=2)
    for again in (backbone, net, nn.Sequential(backbone)):
        with pytest.raises(ValueError, match="elastic already"):
            ElasticNet(again, SHAPE, depths=2)
    assert skippable(net.extract(1)) == ["layer1.0"]  # a plain net again


def test_backbone_is_untouched_where_wrapping_fails(toys):
    backbone = toys.build()
    with pytest.raises(ValueError, match="skippable blocks"):
        ElasticNet(backbone, (3, 8, 8), depths=99)
    assert not any("forward" in vars(module) for module in backbone.modules())
    assert ElasticNet(backbone, (3, 8, 8), depths=2).stages == [2, 1]

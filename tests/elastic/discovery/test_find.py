from functools import partial

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

from teamnet_pl.elastic import ElasticNet, trace_backbone
from tests.helpers.nets import (
    SHAPE,
    BlockNet,
    Residual,
    basic_resnet,
    block_names,
    make_backbone,
    swin,
    torchvision_vit,
)


def skippable(backbone, shape=SHAPE, patterns=None):
    return [block.name for block in trace_backbone(backbone, shape, patterns).blocks]


NETS = {
    "resnet18": (tv.resnet18, "BasicBlock", [2, 1, 1, 1]),
    "resnet50": (tv.resnet50, "Bottleneck", [2, 3, 5, 2]),
    "efficientnet_b0": (tv.efficientnet_b0, "MBConv", [1, 1, 2, 2, 3]),
    "mobilenet_v3_large": (tv.mobilenet_v3_large, "InvertedResidual", [1, 1, 2, 3, 1, 2]),
    "vit_thin": (
        lambda: torchvision_vit(12),
        "EncoderBlock",
        [12],
    ),
    "swin_thin": (
        lambda: swin([2, 2, 6, 2]),
        "SwinTransformerBlock",
        [2, 2, 6, 2],
    ),
    "resnet18_zero_init": (
        lambda: tv.resnet18(zero_init_residual=True),
        "BasicBlock",
        [2, 1, 1, 1],
    ),
    # Zero-initialized by default, with more layers after the zeros.
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
    trace = trace_backbone(net, SHAPE)
    # Neither a stage nor a layer inside a block.
    kinds = [type(net.get_submodule(block.name)).__name__ for block in trace.blocks]
    assert set(kinds) == {kind}
    if hasattr(net.get_submodule(trace.blocks[0].name), "use_res_connect"):
        assert [block.name for block in trace.blocks] == [
            name for name, module in net.named_modules() if getattr(module, "use_res_connect", 0)
        ]
    assert trace.stages == stages


@pytest.mark.parametrize("kind", ["residual", "preactivation", "transformer"])
@pytest.mark.parametrize("stages", [[(1, False)], [(2, True)], [(3, False), (1, True), (2, True)]])
def test_tiny_nets(kind, stages):
    assert skippable(make_backbone(kind, stages), (3, 8, 8)) == block_names(kind, stages)


def test_blocks_have_names_and_stages():
    trace = trace_backbone(tv.resnet18(), SHAPE)
    assert [(block.name, block.stage) for block in trace.blocks] == [
        ("layer1.0", 0),
        ("layer1.1", 0),
        ("layer2.1", 1),
        ("layer3.1", 2),
        ("layer4.1", 3),
    ]


@pytest.mark.parametrize("make", [tv.alexnet, partial(tv.vgg11_bn, init_weights=False)])
def test_nets_without_residual_blocks(make):
    with pytest.raises(ValueError, match=r"^(AlexNet|VGG) has no residual block.*patterns"):
        trace_backbone(make(num_classes=4), (3, 64, 64))


# Patterns


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["layer1.*"], ["layer1.0", "layer1.1"]),
        (["layer2.1", "layer1.0"], ["layer1.0", "layer2.1"]),
        (["layer[12].1"], ["layer1.1", "layer2.1"]),
        (["layer1"], ["layer1"]),
        (["layer1.0.conv2"], ["layer1.0.conv2"]),
        # layer2.0 downsamples, but the layers inside it do not become blocks.
        (["layer2.*"], ["layer2.1"]),
        (["layer1.*", "layer2.*"], ["layer1.0", "layer1.1", "layer2.1"]),
    ],
)
def test_patterns(patterns, names):
    assert skippable(basic_resnet([2, 2, 1, 1]), patterns=patterns) == names


def test_a_pattern_may_match_other_than_residual_blocks():
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
def test_wrong_pattern_lists_the_blocks(pattern):
    with pytest.raises(
        ValueError, match=r"matches '.*'\. There are: .*layer1\.0, .*layer2\.1"
    ) as error:
        trace_backbone(basic_resnet([1, 2, 1, 1]), SHAPE, ["layer1.0", pattern])
    assert repr(pattern) in str(error.value)
    assert "layer2.0," not in str(error.value)


# Blocks in blocks


def layers():
    return nn.Sequential(Residual(), Residual())


class Parts(nn.Module):
    """Two residual parts that make up a block."""

    def __init__(self):
        super().__init__()
        self.mixer, self.mlp = Residual(), Residual()

    def forward(self, x):
        return self.mlp(self.mixer(x))


class OwnWeights(Residual):
    """A block with residual layers inside it."""

    def __init__(self):
        super().__init__()
        self.encoding1, self.encoding2 = Residual(), Residual()

    def forward(self, x):
        x = self.encoding1(x)
        return self.encoding2(super().forward(x))


class Stage(nn.Module):
    """Numbered blocks and a parameter beside them."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4, 8, 8))
        self.blocks = nn.Sequential(Parts(), Parts())

    def forward(self, x):
        return self.blocks(x + self.position)


class InSomething(nn.Module):
    """A residual layer inside a module that is not residual."""

    def __init__(self):
        super().__init__()
        self.part = Residual()
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
        ([InSomething, InSomething], ["0.part", "1.part"]),  # for lack of better ones
    ],
)
def test_nested_blocks(blocks, names):
    trace = trace_backbone(BlockNet(blocks=[make() for make in blocks]), (3, 8, 8))
    assert [block.name for block in trace.blocks] == [f"blocks.{name}" for name in names]


def test_rows_of_single_layers_are_left_out():
    """Such as positional encodings."""
    stem = nn.Sequential(Residual(), Residual())
    for last in (Parts(), Residual()):
        net = BlockNet(stem, blocks=[Parts(), last])
        assert skippable(net, (3, 8, 8)) == ["blocks.0", "blocks.1"]


def test_blocks_with_a_container_each_are_one_stage():
    wrapped = [nn.Sequential(Residual(), nn.Conv2d(4, 4, 1)) for _ in range(3)]
    trace = trace_backbone(BlockNet(blocks=wrapped), (3, 8, 8))
    assert [block.name for block in trace.blocks] == [f"blocks.{i}.0" for i in range(3)]
    assert trace.stages == [3]

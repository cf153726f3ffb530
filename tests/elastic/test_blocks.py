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


class CenterOnBatch(nn.Module):
    """A layer that mixes the samples of a batch."""

    def forward(self, x):
        return x - x.mean(0)


class CenterInTraining(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("layer", [CenterOnBatch, CenterInTraining])
def test_layer_that_mixes_samples(layer):
    with pytest.raises(ValueError, match=rf"between \({layer.__name__}\) mixes the samples"):
        trace(Around(layer()), (3, 8, 8))
    block = Add()
    block.conv = nn.Sequential(block.conv, layer())
    with pytest.raises(ValueError, match=rf"blocks.1.conv.1 \({layer.__name__}\) mixes"):
        trace(Around(blocks=[Add(), block]), (3, 8, 8))


def test_layer_that_mixes_samples_where_it_does_not_show_yet():
    """As where the last layer of a residual branch starts at zero."""
    block, last = Add(), nn.Conv2d(4, 4, 1)
    nn.init.zeros_(last.weight)
    block.conv = nn.Sequential(block.conv, CenterOnBatch(), last)
    with pytest.raises(ValueError, match=r"blocks.1.conv.1 \(CenterOnBatch\) mixes"):
        trace(Around(blocks=[Add(), block]), (3, 8, 8))


def test_layer_that_mixes_samples_whatever_their_sign():
    net = nn.Sequential(Lambda(lambda images: images / images.norm()), Around())
    with pytest.raises(ValueError, match=r"0 \(Lambda\) mixes the samples"):
        trace(net, (3, 8, 8))


def test_backbone_that_mixes_samples_itself():
    with pytest.raises(ValueError, match=r"Around\) mixes the samples"):
        trace(Around(after=lambda logits: logits / logits.norm()), (3, 8, 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        Lambda(lambda x: x / x.flatten(1).norm(dim=1)[:, None, None, None]),
    ],
    ids=lambda layer: str(layer),
)
def test_layers_that_do_not_mix_samples_or_can_be_kept_apart(layer):
    assert skippable(Around(layer), (3, 8, 8)) == ["blocks.0", "blocks.1"]


def test_batch_norm_that_runs_at_two_places():
    norm, first, second = nn.BatchNorm2d(4), Add(), Add()
    first.norm = norm
    first.conv = nn.Sequential(first.conv, norm)
    second.conv = nn.Sequential(second.conv, norm)
    with pytest.raises(ValueError, match=r"conv\.1 runs in several places"):
        trace(Around(blocks=[first, second]), (3, 8, 8))


def test_batch_norm_that_runs_twice_in_one_block():
    norm, block = nn.BatchNorm2d(4), Add()
    block.conv = nn.Sequential(block.conv, norm, nn.ReLU(), norm)
    assert skippable(Around(blocks=[block, Add()]), (3, 8, 8)) == ["blocks.0", "blocks.1"]


class DropsInTraining(Around):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return self.head(x if self.training else self.blocks[1](x))


def test_blocks_that_differ_in_training():
    with pytest.raises(ValueError, match="In training DropsInTraining runs its blocks as"):
        trace(DropsInTraining(), (3, 8, 8))


class SequenceFirst(nn.Module):
    """Tokens of shape (tokens, N, width), as attention layers take by default."""

    def __init__(self, size):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, size // 2, size // 2)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(4, 2, 8, norm_first=True) for _ in range(2))
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize("width", [4, 8, 12])
def test_batch_axis_that_is_not_the_first(width):
    """The streams lie along the first axis."""
    with pytest.raises(ValueError, match="batch"):
        trace(SequenceFirst(8), (3, 8, width))


class Folded(Around):
    """Quarters of the images in the batch axis, those of one image together, or not."""

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


def test_images_that_are_folded_into_the_batch(toys):
    net = ElasticNet(Folded(together=True), (3, 8, 8), depths=3)
    images = torch.randn(3, 3, 8, 8)
    expected = [toys.by_hand(Folded(together=True), net, depth) for depth in net.depths]
    for plain in expected:
        plain.load_state_dict(net.backbone.state_dict(), strict=False)
    torch.testing.assert_close(net.packed(images), torch.stack([e(images) for e in expected]))
    with pytest.raises(ValueError, match=r"first axis of what blocks\.0 returns is not the batch"):
        trace(Folded(together=False), (3, 8, 8))


# Blocks that cannot be skipped


class Mixes(Add):
    def forward(self, x, first):
        return x + self.conv(first)


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


@pytest.mark.parametrize(
    ("call", "block"),
    [
        (lambda block, x, first: block(x, first), Mixes),  # a second batch
        (lambda block, x, first: block(x, first=first), Mixes),
        (lambda block, x, first: block(x=x), Add),  # by keyword
    ],
)
def test_block_that_is_not_called_with_its_input_alone(call, block):
    with pytest.raises(ValueError, match="no residual block"):
        trace(Calls(call, block(), block()), (3, 8, 8))
    with pytest.raises(ValueError, match="keeps its input's shape"):
        trace(Calls(call, block(), block()), (3, 8, 8), ["blocks.*"])


def test_block_that_is_called_with_settings():
    class Scaled(Add):
        def forward(self, x, scale, negative=False):
            return x + (-scale if negative else scale) * self.conv(x)

    net = Calls(lambda block, x, first: block(x, 0.5, negative=True), Scaled(), Scaled())
    assert skippable(net, (3, 8, 8)) == ["blocks.0", "blocks.1"]


def test_block_that_runs_twice():
    twice = Add()
    assert skippable(Around(blocks=[twice, Add(), twice]), (3, 8, 8)) == ["blocks.1"]


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

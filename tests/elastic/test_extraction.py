import copy
import pickle
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.extraction import drop_block
from tests.helpers.nets import (
    basic_resnet,
    convnext,
    make_backbone,
    make_elastic,
    resnet,
    swin,
    torchvision_vit,
    train,
    vit,
)

CNN = tv.convnext.CNBlockConfig
MBCONV = tv.efficientnet.MBConvConfig


def torchvision_convnext(layers):
    widths = [8, 12, 16, None]
    settings = [CNN(*both) for both in zip(widths, widths[1:], layers, strict=False)]
    return tv.ConvNeXt(settings, num_classes=5)


def efficientnet(layers):
    settings = [MBCONV(2, 3, 1, 16, 16, layers[0]), MBCONV(2, 3, 2, 16, 24, layers[1])]
    return tv.EfficientNet(settings, dropout=0.0, num_classes=5)


def timm_resnet(layers):
    channels = (8, 12, 16, 20)
    return timm.models.ResNet(
        timm.models.resnet.BasicBlock, layers, channels=channels, num_classes=5
    )


# A function that builds a net, and the net's layers; the blocks that a depth keeps in each stage,
# or their number if they are spread evenly; the layers of the net with these blocks only.
NETS = {
    "resnet": (basic_resnet, [2, 2, 2, 2], [2, 0, 1, 0], [2, 1, 2, 1]),
    "bottleneck": (resnet, [2, 3, 3, 2], [1, 1, 2, 0], [2, 2, 3, 1]),
    "vit": (torchvision_vit, 4, [2], 2),
    "vit_last_layers": (torchvision_vit, 4, 2, 2),
    "vit_without_layers": (torchvision_vit, 2, [0], 0),
    "convnext": (torchvision_convnext, [2, 2, 3], [1, 0, 2], [1, 0, 2]),
    "convnext_last_layers": (torchvision_convnext, [2, 2, 3], 3, [1, 1, 1]),
    "swin": (swin, [2, 4], [1, 3], [1, 3]),
    "efficientnet": (efficientnet, [2, 3], [1, 1], [1, 2]),
    "timm_vit": (vit, 4, [1], 1),
    "timm_vit_last_layers": (vit, 4, 1, 1),
    "timm_convnext": (convnext, [2, 1, 3, 1], [1, 1, 2, 0], [1, 1, 2, 0]),
    "timm_resnet": (timm_resnet, [2, 2, 3, 1], [1, 0, 1], [2, 1, 2, 1]),
}


@pytest.mark.parametrize(
    ("build", "layers", "kept", "kept_layers"),
    [pytest.param(*case, id=name) for name, case in NETS.items()],
)
def test_the_extracted_net_matches_a_hand_built_one(build, layers, kept, kept_layers):
    torch.manual_seed(0)
    backbone = build(layers).double()
    full = ElasticNet(copy.deepcopy(backbone), (3, 32, 32), depths=2).stages
    depths = [sum(full), kept] if isinstance(kept, int) else [full, kept]
    net = ElasticNet(backbone, (3, 32, 32), depths=depths, policy="evenly_spread")
    depth = net.depths[1]
    train(net, batch_size=2)
    images = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad(), net.eval().at(depth):
        expected = net(images)
        whole = net.backbone.state_dict()

    plain = net.extract(depth)
    assert type(plain) is type(backbone)
    close(plain(images), expected)
    assert not plain.training
    assert len(plain.state_dict()) < len(whole)

    hand_built = build(kept_layers).double().eval()
    assert plain.state_dict().keys() == hand_built.state_dict().keys()
    hand_built.load_state_dict(plain.state_dict(), strict=True)
    close(hand_built(images), expected)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["residual", "transformer"])
def net(request):
    stages = [(2, False), (3, True)]
    net = ElasticNet(make_backbone(request.param, stages), (3, 8, 8), depths=4)
    train(net)
    return net


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8).double()


def test_every_depth(net, images):
    net.eval()
    sizes = []
    for depth in net.depths:
        plain = net.extract(depth)
        with net.at(depth):
            close(plain(images), net(images))
        sizes.append(len(plain.state_dict()))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == len(net.backbone.state_dict())


def test_the_extracted_net_has_no_trace_of_the_package(net):
    for depth in net.depths:
        plain = net.extract(depth)
        for module in plain.modules():
            assert "forward" not in vars(module)
            for value in (module, *vars(module).values()):
                assert not type(value).__module__.startswith("teamnet_pl")
        assert b"teamnet_pl" not in pickle.dumps(plain)
        for block in net.blocks:
            assert "forward" in vars(net.backbone.get_submodule(block.name))  # still elastic


def test_skipped_blocks_are_gone(net):
    def blocks(plain):
        kinds = {type(net.backbone.get_submodule(block.name)) for block in net.blocks}
        return sum(type(module) in kinds for module in plain.modules())

    left = [blocks(net.extract(depth)) for depth in net.depths]
    assert [left[0] - count for count in left] == [
        net.depths[0].num_blocks - depth.num_blocks for depth in net.depths
    ]


def test_training_the_extracted_net_leaves_the_elastic_net_unchanged(net, images):
    state = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters()]
    plain = net.extract(net.depths[1]).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = copy.deepcopy(plain.state_dict())
    plain(images).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["head.weight"], plain.head.weight)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients, rtol=0, atol=0)
    assert {id(p) for p in net.parameters()}.isdisjoint(id(p) for p in plain.parameters())


def test_extracting_within_a_scope(net, images):
    net.eval()
    with net.at(net.depths[1]):
        expected = net(images)
    with net.at(net.depths[2]):
        plain = net.extract(net.depths[1])
        close(plain(images), expected)
    close(plain(images), expected)


def test_modes_and_frozen_parameters_are_kept(net):
    net.train()
    net.backbone.head.eval()
    net.backbone.head.weight.requires_grad_(False)
    plain = net.extract(net.depths[-1])
    assert plain.training
    assert not plain.head.training
    assert [p.requires_grad for p in plain.head.parameters()] == [False, True]


def test_weights_per_depth(images):
    net = make_elastic(make_backbone(), 4, (3, 8, 8), per_depth_affine=True)
    weights = []
    for depth in net.depths:
        plain = net.extract(depth)
        with net.at(depth):
            close(plain(images), net(images))
        weights.append(plain.last_norm.weight)
    assert all((one - other).abs().max() > 1e-6 for one, other in pairwise(weights))


class Encoder(nn.Module):
    """Its blocks are called with more arguments than their input."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, 4)
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer(4, 2, 8, 0.0), 3, enable_nested_tensor=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("kept", [2, 1])
def test_blocks_that_are_called_with_keywords(images, kept):
    net = ElasticNet(Encoder().double(), (3, 8, 8), depths=[3, kept]).eval()
    with net.at(kept):
        expected = net(images)
    close(net.packed(images)[1], expected)
    close(net.extract(kept)(images), expected)


class Scaled(nn.Module):
    """Scales the output of each block by a factor that depends on the block's position."""

    def __init__(self, strict, **kwargs):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, 4)
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(layer(4, 2, 8, 0.0) for _ in range(3))
        self.head = nn.Linear(4, 5)
        self.strict = strict
        self.kwargs = kwargs

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for scale, block in zip((1.0, 2.0, 3.0), self.blocks, strict=self.strict):
            x = scale * block(x, **self.kwargs)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    "strict", [True, False]
)  # without blocks it fails, or returns other logits
def test_blocks_that_depend_on_their_position(images, strict):
    backbone = Scaled(strict).double()
    net = ElasticNet(backbone, (3, 8, 8), depths=[3, 1, 0], policy="evenly_spread").eval()
    assert net.depths[1].kept == (False, True, False)
    for depth, expected in zip(net.depths, net.packed(images), strict=True):
        close(net.extract(depth)(images), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_each_weight_is_copied_once(strict, monkeypatch):
    """Also if removing the blocks takes a second attempt."""
    net = ElasticNet(Scaled(strict), (3, 8, 8), depths=[3, 1], policy="evenly_spread")
    copied = []
    original = nn.Parameter.__deepcopy__

    def copy_and_count(self, memo):
        copied.append(self.numel())
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copy_and_count)
    net.extract("d1")
    assert sum(copied) == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    "backbone",
    [Scaled(strict=True, src_mask=None), Encoder()],  # the latter looks at its first block
)
def test_net_that_cannot_do_without_a_block(backbone):
    net = ElasticNet(backbone, (3, 8, 8), depths=[3, 0]).train()
    kind = type(backbone).__name__
    with pytest.raises(ValueError, match=rf"{kind} cannot do without .*\.0, .*\.2: it fails"):
        net.extract("d0")
    assert all(module.training for module in net.modules())


def test_extracting_leaves_the_elastic_net_unchanged(net, images):
    net.train()
    net.backbone.head.eval()
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    net.extract(net.depths[1])
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    close(net.eval()(images), net.packed(images)[0])


def test_net_that_has_diverged_can_be_extracted(net):
    """To examine it, for example."""
    net.backbone.head.bias.data.fill_(torch.nan)
    assert net.extract(net.depths[1]).head.bias.isnan().all()


# Removing one block


def test_numbers_move_up():
    layers = [nn.Linear(i + 1, i + 1) for i in range(3)]
    net = nn.Sequential(*layers)
    drop_block(net, "1")
    assert dict(net.named_children()) == {"0": layers[0], "1": layers[2]}


def test_names_with_a_number_move_up():
    net = nn.Module()
    net.layers = nn.Sequential()
    for i in range(3):
        net.layers.add_module(f"layer_{i}", nn.Linear(i + 1, i + 1))
    first, _, last = net.layers
    drop_block(net, "layers.layer_1")
    assert dict(net.layers.named_children()) == {"layer_0": first, "layer_1": last}


def test_other_names_stay():
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(1, 1))
    net.add_module("block", nn.Linear(2, 2))
    net.add_module("head", nn.Linear(3, 3))
    drop_block(net, "block")
    assert [(name, child.in_features) for name, child in net.named_children()] == [
        ("stem", 1),
        ("head", 3),
    ]


def test_identity_where_the_parent_calls_its_blocks_by_name():
    net = nn.Module()
    net.first, net.second = nn.Linear(1, 1), nn.Linear(2, 2)
    drop_block(net, "second")
    assert [type(child) for child in net.children()] == [nn.Linear, nn.Identity]


@pytest.mark.parametrize("name", ["2", "nothing.0"])
def test_no_such_block(name):
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(AttributeError):
        drop_block(net, name)
    assert len(net) == 2

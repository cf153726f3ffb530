from itertools import combinations

import pytest
import torch
import torchvision.models as tv
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from teamnet_pl.baselines import EarlyExitNet
from teamnet_pl.baselines.early_exits import TokenMean, make_head, nearest_in_order
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.errors import TeamNetError
from tests.helpers.nets import (
    BlockNet,
    Lambda,
    PairNet,
    Residual,
    cifar,
    convnext,
    swin,
    torchvision_vit,
    train,
    vit,
)

SHAPE = (3, 32, 32)


def make_net(backbone, **kwargs):
    """A net in float64 that has been trained for a step, in evaluation mode."""
    net = EarlyExitNet(backbone.double(), SHAPE, **kwargs)
    train(net, steps=1)
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


# Against cuts by hand


def normed(features, norm):
    """What a batch norm does in evaluation."""
    mean, var, scale, shift = (
        value[:, None, None]
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (features - mean) / (var + norm.eps).sqrt() * scale + shift


def test_exits_of_feature_maps(images):
    torch.manual_seed(0)
    net = make_net(cifar(4))
    assert net.exits == {"d5": "layer3.0", "d2": "layer1.2", "d0": "layer1.0"}
    backbone = net.backbone
    features = backbone.relu(backbone.bn1(backbone.conv1(images)))
    first = backbone.layer1[0](features)
    second = backbone.layer1[2](backbone.layer1[1](first))
    third = backbone.layer3[0](backbone.layer2(second))
    expected = [backbone(images)]
    for depth, features, widths in (
        ("d5", third, []),
        ("d2", second, [8, 16]),
        ("d0", first, [8, 16]),
    ):
        layers = list(net.heads[depth])
        for width in widths:
            convolution, norm, _relu, *layers = layers
            features = nn.functional.conv2d(features, convolution.weight, stride=2, padding=1)
            features = normed(features, norm).clamp(min=0)
            assert features.shape[1] == width
        assert features.shape[1] == 16
        linear = layers[-1]
        expected.append(features.mean((2, 3)) @ linear.weight.T + linear.bias)
    torch.testing.assert_close(net.packed(images), torch.stack(expected))


@pytest.mark.parametrize("make", [vit, torchvision_vit])
def test_exits_of_tokens(make, images):
    net = make_net(make(6), depths=[6, 4, 2])
    rows = {vit: "blocks.{}", torchvision_vit: "encoder.layers.encoder_layer_{}"}
    assert net.exits == {"d4": rows[make].format(3), "d2": rows[make].format(1)}
    tokens = []
    for name in net.exits.values():
        block = net.backbone.get_submodule(name)
        block.register_forward_hook(lambda _module, _args, output: tokens.append(output))
    expected = [net.backbone(images)]
    for depth, features in zip(net.exits, reversed(tokens), strict=True):
        norm, _, linear = net.heads[depth]
        centered = features - features.mean(-1, keepdim=True)
        features = centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        features = (features * norm.weight + norm.bias).mean(1)
        expected.append(features @ linear.weight.T + linear.bias)
    torch.testing.assert_close(net.packed(images), torch.stack(expected))


def test_exits_of_maps_whose_channels_come_last(images):
    net = make_net(swin([2, 2]), depths=[4, 3])
    features = {}
    net.backbone.get_submodule(net.exits["d3"]).register_forward_hook(
        lambda _module, _args, output: features.update(maps=output)
    )
    with net.at("d3"):
        logits = net(images)
    norm, _, linear = net.heads["d3"]
    assert norm.normalized_shape == (16,)
    torch.testing.assert_close(logits, linear(norm(features["maps"]).mean((1, 2))))


@pytest.mark.parametrize("make", [cifar, vit, torchvision_vit, convnext, swin, tv.mobilenet_v2])
def test_extracted_nets_are_the_same_in_both_modes(make, images):
    size = {cifar: 4, convnext: [1, 2, 2, 1], swin: [2, 2]}
    net = make_net(make(size.get(make, 4)) if make is not tv.mobilenet_v2 else make(), depths=3)
    for training in (False, True):
        for depth in net.train(training).depths:
            plain = net.extract(depth)
            with net.at(depth):
                torch.manual_seed(0)
                expected = net(images)
            assert plain.training == training
            torch.manual_seed(0)
            torch.testing.assert_close(plain(images), expected)
    small = net.extract(net.depths[-1])
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in net.backbone.parameters()
    )


# What runs


def test_the_backbone_runs_once_and_no_further_than_needed(images):
    net = make_net(cifar(4))
    runs = []
    for name, module in net.backbone.named_modules():
        module.register_forward_hook(lambda *_, name=name: runs.append(name))
    net.packed(images)
    assert runs.count("conv1") == runs.count("layer3.2") == runs.count("fc") == 1
    for depths, last in ((["d5", "d0"], "layer3.0"), (["d2"], "layer1.2"), (["d0"], "layer1.0")):
        runs.clear()
        net.packed(images, depths)
        assert runs.count("conv1") == 1
        assert runs[-1] == last
        runs.clear()
        with net.at(depths[0]):
            net(images)
        assert runs[-1] == last


def test_hooks_are_gone_also_if_the_net_fails(images):
    net = make_net(cifar(4))
    with pytest.raises(RuntimeError):
        net.packed(images[:, :1])
    net.packed(images)
    assert not any(module._forward_hooks for module in net.modules())


# Where the exits are


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7, unique=True), st.data())
def test_values_nearest_to_targets(values, data):
    values = sorted(values)
    count = data.draw(st.integers(1, len(values)))
    targets = sorted(data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)))
    chosen = nearest_in_order(values, targets)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    # The first takes the nearest that leaves enough for the others, then the second, ...
    best = min(
        combinations(range(len(values)), count),
        key=lambda picked: [abs(values[i] - target) for i, target in zip(picked, targets)],  # noqa: B905
    )
    assert [values[i] for i in chosen] == [values[i] for i in best] or all(
        abs(values[i] - t) == abs(values[j] - t)
        for i, j, t in zip(chosen, best, targets)  # noqa: B905
    )


@pytest.mark.parametrize(
    ("make", "depths", "tolerance"),
    [
        pytest.param(lambda: cifar(16), 4, 0.04, id="resnet20"),
        pytest.param(lambda: tv.resnet18(num_classes=10), 4, 0.15, id="resnet18"),
        pytest.param(lambda: tv.mobilenet_v2(num_classes=10), 4, 0.05, id="mobilenet_v2"),
        pytest.param(lambda: vit(12), [12, 8, 4], 0.01, id="vit"),
    ],
)
def test_the_costs_are_about_those_of_the_elastic_net(make, depths, tolerance):
    costs = depth_costs(EarlyExitNet(make(), SHAPE, depths=depths), SHAPE)
    elastic = depth_costs(ElasticNet(make(), SHAPE, depths=depths), SHAPE)
    assert list(costs) == list(elastic)
    for depth, measured in costs.items():
        assert measured.macs == pytest.approx(elastic[depth].macs, rel=tolerance)


def test_no_other_exit_is_nearer():
    """Names each block in turn as the only exit there could be."""
    net = EarlyExitNet(cifar(4), SHAPE, depths=[7, 4])
    target = depth_costs(ElasticNet(cifar(4), SHAPE, depths=[7, 4]), SHAPE)["d4"].macs
    distance = {}
    for row in (1, 2, 3):
        for number in range(3):
            other = EarlyExitNet(cifar(4), SHAPE, depths=[7, 4])
            other.exits["d4"] = f"layer{row}.{number}"
            channels, maps = 4 * 2 ** (row - 1), 2 ** (row - 1)
            layers = []
            while channels < 16:
                layers.append(nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False))
                channels, maps = 2 * channels, 2 * maps
            other.heads["d4"] = nn.Sequential(
                *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
            )
            measured = depth_costs(other, SHAPE)["d4"].macs
            distance[other.exits["d4"]] = abs(measured - target)
    assert net.exits["d4"] == min(distance, key=distance.get)


@pytest.mark.parametrize(
    ("features", "last", "widths"),
    [
        ((8, 4, 8), (8, 4, 8), [8]),  # as high as half its width, as the image
        ((4, 8, 16), (4, 8, 16), [4]),
        ((4, 8, 16), (9, 4, 8), [4, 9]),
        ((4, 8, 16), (16, 2, 4), [4, 8, 16]),
        ((4, 7, 13), (16, 2, 4), [4, 8, 16]),  # rounded up
        ((4, 8, 16), (10, 2), [4]),  # tokens follow
        ((8, 4, 8), (5, 1, 2), [8, 6, 5]),  # fewer channels
        ((4, 4, 8), (9, 8, 16), [4]),  # a net that enlarges its maps
    ],
)
def test_the_head_of_feature_maps(features, last, widths):
    maps = torch.randn(2, *features)
    head = make_head(maps, torch.randn(2, *last), (3, 32, 64), 5)
    *layers, pool, _flatten, linear = head
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 3 * len(convolutions)
    assert [widths[0], *(layer.out_channels for layer in convolutions)] == widths
    assert isinstance(pool, nn.AdaptiveAvgPool2d)
    assert linear.in_features == widths[-1]
    assert head(maps).shape == (2, 5)


@pytest.mark.parametrize("features", [(4, 8, 8), (2, 4, 16), (10, 16), (8, 8)])
def test_the_head_of_tokens(features):
    tokens = torch.randn(2, *features)
    head = make_head(tokens, tokens, (3, 32, 64), 5)
    assert [type(layer) for layer in head] == [nn.LayerNorm, TokenMean, nn.Linear]
    assert head[0].normalized_shape == features[-1:]
    assert head(tokens).shape == (2, 5)


# Refusals


def test_a_net_that_cannot_be_traced_is_refused():
    def branch(features):
        return features if features.sum() > -1e9 else -features

    with pytest.raises(TeamNetError, match=r"^BlockNet cannot have exits, since torch\.fx cannot"):
        EarlyExitNet(BlockNet(between=Lambda(branch)), (3, 8, 8), depths=2)


def test_a_block_whose_output_is_not_its_last_value_is_refused():
    """The extractor takes the last value."""

    class Noting(Residual):
        def forward(self, x):
            output = super().forward(x)
            self.note = 2 * output
            return output

    backbone = BlockNet(blocks=[Noting(), Noting()])
    with pytest.raises(TeamNetError, match=r"BlockNet cannot have exits: cut behind blocks\.0"):
        EarlyExitNet(backbone, (3, 8, 8), depths=[2, 1], blocks=["blocks.*"])


def test_blocks_that_return_no_features_are_refused():
    with pytest.raises(TeamNetError, match=r"PairNet has 0 blocks that return .* at 1 depths"):
        EarlyExitNet(PairNet(), (3, 8, 8), depths=[2, 0])

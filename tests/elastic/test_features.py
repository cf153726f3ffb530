"""Features by depth, against those of each depth alone."""

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.backbones import CifarResNet
from teamnet_pl.elastic import DepthFeatures, ElasticNet
from teamnet_pl.elastic.features import modules_named, recorded

MODULES = ["layer1", "layer2.1", "layer3.?", "avgpool", "layer3.1.conv1"]


def make_net(**kwargs):
    torch.manual_seed(0)
    net = ElasticNet(CifarResNet(20, 5, 3, 4), (3, 8, 8), **kwargs).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0)
    return net


@given(data=st.data(), training=st.booleans())
@settings(max_examples=20)
def test_features_are_those_of_each_depth_alone(data, training):
    policy = data.draw(st.sampled_from(["last_stage_first", "round_robin", "evenly_spread"]))
    net = make_net(depths=[7, 5, 4, 2, 0], policy=policy).train(training)
    depths = data.draw(st.lists(st.sampled_from(net.depths), min_size=1, unique=True))
    depths.sort(key=net.depths.index)
    features = DepthFeatures(net, MODULES)
    images = torch.randn(3, 3, 8, 8, dtype=torch.double)
    plain = copy.deepcopy(net)
    with features.recorded() as outputs:
        net.packed(images, depths)
    by_depth = features.by_depth(outputs, depths)
    assert list(by_depth) == [depth.name for depth in depths]
    for depth in depths:
        with (
            plain.at(depth),
            recorded(plain.backbone, modules_named(plain.backbone, MODULES)) as one,
        ):
            plain(images)
        assert by_depth[depth.name].keys() == one.keys()
        assert {"layer1", "avgpool"} <= one.keys()
        for name, values in one.items():
            torch.testing.assert_close(by_depth[depth.name][name], values)


def test_a_skipped_block_hands_on_its_input_and_its_layers_have_no_features():
    net = make_net(depths=[7, 5, 0]).eval()
    features = DepthFeatures(net, ["layer3.0", "layer3.1", "layer3.1.conv1"])
    with features.recorded() as outputs:
        net.packed(torch.randn(2, 3, 8, 8, dtype=torch.double))
    by_depth = features.by_depth(outputs)
    names = {
        depth: [name for name in values if "conv" in name] for depth, values in by_depth.items()
    }
    assert names == {"d7": ["layer3.1.conv1"], "d5": [], "d0": []}
    assert torch.equal(by_depth["d0"]["layer3.1"], by_depth["d0"]["layer3.0"])
    assert not torch.equal(by_depth["d7"]["layer3.1"], by_depth["d7"]["layer3.0"])


def test_features_take_part_in_the_gradient():
    net = make_net(depths=[7, 0]).eval()
    features = DepthFeatures(net, ["avgpool"])
    with features.recorded() as outputs:
        net.packed(torch.randn(2, 3, 8, 8, dtype=torch.double))
    features.by_depth(outputs)["d0"]["avgpool"].sum().backward()
    assert net.backbone.conv1.weight.grad.abs().max() > 0
    assert net.backbone.layer3[1].conv1.weight.grad is None or not (
        net.backbone.layer3[1].conv1.weight.grad.abs().max()
    )


def test_hooks_do_not_stay():
    net = make_net()
    features = DepthFeatures(net, ["avgpool"])
    with features.recorded():
        net.packed(torch.randn(2, 3, 8, 8, dtype=torch.double))
    assert not net.backbone.avgpool._forward_hooks


def test_a_module_that_is_not_there_is_refused():
    net = ElasticNet(torchvision.models.resnet18(num_classes=5), (3, 32, 32), depths=2)
    with pytest.raises(ValueError, match=r"ResNet has no module layer9 or head\.\? that returns"):
        DepthFeatures(net, ["layer9", "head.?"])

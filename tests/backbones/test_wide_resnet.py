import pytest
import torch

from teamnet_pl.backbones import WideResNet
from teamnet_pl.elastic import ElasticNet


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)],
)
def test_parameters_are_those_of_the_paper(depth, width, millions):
    """Zagoruyko and Komodakis, Table 4."""
    with torch.device("meta"):
        net = WideResNet(depth, width)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("depth", [16, 22])
def test_depth_counts_convolutions(depth):
    assert sum(isinstance(m, torch.nn.Conv2d) for m in WideResNet(depth, 2).modules()) == depth


@pytest.mark.parametrize("depth", [-2, 4, 20, 27])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 4.*found {depth}"):
        WideResNet(depth, 1)


def test_features_of_each_stage_are_those_of_the_paper():
    net, shapes = WideResNet(16, 2, num_classes=7, in_channels=1), []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1:]))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


def test_blocks():
    assert ElasticNet(WideResNet(22, 2), (3, 16, 16)).stages == [2, 2, 2]
    first = WideResNet(10, 1).layer1[0]  # as wide as the stem
    features = torch.randn(2, 16, 8, 8)
    for name in ("conv1", "conv2"):
        torch.nn.init.zeros_(getattr(first, name).weight)
    torch.testing.assert_close(first(features), features)


def test_dropout_is_between_the_convolutions():
    block = WideResNet(10, 1, dropout=1.0).layer1[0]
    features = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(features), features)
    assert not torch.equal(block.eval()(features), features)

import pytest
import torch

from teamnet_pl.backbones import CifarResNet


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_parameters_are_those_of_the_paper(depth, millions):
    """He et al., Table 6, whose shortcuts have no parameters."""
    net = CifarResNet(depth)
    shortcuts = sum(p.numel() for name, p in net.named_parameters() if "downsample" in name)
    parameters = sum(p.numel() for p in net.parameters()) - shortcuts
    assert round(parameters / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize("depth", [20, 56])
def test_depth_counts_weighted_layers(depth):
    layers = torch.nn.Conv2d, torch.nn.Linear
    named = CifarResNet(depth).named_modules()
    assert sum(isinstance(m, layers) and "downsample" not in name for name, m in named) == depth


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 52])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*found {depth}"):
        CifarResNet(depth)


def test_features_of_each_stage_are_those_of_the_paper():
    net, shapes = CifarResNet(20, num_classes=7, in_channels=1, width=8), []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1:]))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]

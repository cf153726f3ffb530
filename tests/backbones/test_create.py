import pytest
import timm
import torch
import torchvision
from torch import nn

from teamnet_pl.backbones import BackboneConfig, CifarResNet, create_backbone


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("cifar/resnet20", {}, CifarResNet),
        ("cifar/resnet20", {"width": 4}, CifarResNet),
        ("torchvision/resnet18", {}, torchvision.models.ResNet),
        ("torchvision/mobilenet_v3_small", {"dropout": 0.1}, torchvision.models.MobileNetV3),
        ("timm/resnet18", {}, timm.models.ResNet),
        ("timm/test_vit", {"img_size": 32}, timm.models.VisionTransformer),
        ("timm/test_resnet.r160_in1k", {}, timm.models.ResNet),
        ("teamnet_pl.backbones.CifarResNet", {"depth": 26}, CifarResNet),
        ("own_nets.GroupNormNet", {"width": 6}, nn.Sequential),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_each_form_of_name(own_nets, name, options, kind, channels):
    net = create_backbone(BackboneConfig(name, options), num_classes=7, in_channels=channels)
    assert isinstance(net, kind)
    assert net(torch.randn(2, channels, 32, 32)).shape == (2, 7)


def test_options_reach_the_model(own_nets):
    def create(name, **options):
        return create_backbone(BackboneConfig(name, options), num_classes=7, in_channels=3)

    assert create("cifar/resnet32", width=4).fc.in_features == 16
    assert len(create("cifar/resnet32").layer1) == 5
    assert create("torchvision/mobilenet_v3_small", dropout=0.125).classifier[2].p == 0.125
    assert create("timm/test_vit", img_size=16).patch_embed.img_size == (16, 16)
    assert create("own_nets.GroupNormNet", width=6)[0].out_channels == 6
    assert create("cifar/resnet20", num_classes=3).fc.out_features == 3  # the user's word is last


@pytest.mark.parametrize("name", ["counts_classes", "takes_anything", "GroupNormNet"])
def test_an_imported_net_gets_what_it_takes(own_nets, name):
    net = create_backbone(BackboneConfig(f"own_nets.{name}"), num_classes=7, in_channels=3)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def test_an_imported_net_never_keeps_another_number_of_classes():
    """What this one hands on in **kwargs has no number of channels."""
    with pytest.raises(ValueError, match="in_channels"):
        create_backbone(BackboneConfig("torchvision.models.resnet18"), 7, in_channels=3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_one_channel_sums_the_first_convolution_of_torchvision(name):
    """Grey images give what the original net makes of them in each of three channels."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, num_classes=7).eval()
    torch.manual_seed(0)
    net = create_backbone(BackboneConfig(f"torchvision/{name}"), 7, in_channels=1).eval()
    (first, *_), (original_first, *_) = (
        [m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (net, original)
    )
    assert first.in_channels == 1
    torch.testing.assert_close(first.weight, original_first.weight.sum(1, keepdim=True))
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(
        net(grey), original(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4
    )
    assert first.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cifar/resnet21", "cifar/resnet20"),
        ("cifar/", "cifar/resnet20"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision/resnet50"),  # does not classify
        ("timm/resnet81", "timm/resnet18"),
        ("tim/resnet18", "timm/"),
        ("cifar", "cifar/<model>"),
        ("resnet18", "torchvision/<model>"),
        ("", "import path"),
        ("no_such_package.Net", "No module named 'no_such_package'"),
        ("teamnet_pl.backbones.NoSuchNet", "NoSuchNet"),
    ],
)
def test_unknown_names_are_answered_with_what_was_meant(name, meant):
    with pytest.raises(ValueError, match=meant):
        create_backbone(BackboneConfig(name), num_classes=7, in_channels=3)


@pytest.mark.parametrize(
    "name",
    [
        "cifar/resnet20",
        "torchvision/resnet18",
        "timm/resnet18",
        "teamnet_pl.backbones.CifarResNet",
    ],
)
def test_options_that_a_model_does_not_take_are_refused(name):
    config = BackboneConfig(name, {"widht": 4})
    with pytest.raises(ValueError, match=f"{name} cannot be made with the options .*widht"):
        create_backbone(config, num_classes=7, in_channels=3)


def test_values_that_a_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match="6n"):
        create_backbone(BackboneConfig("teamnet_pl.backbones.CifarResNet", {"depth": 21}), 7, 3)

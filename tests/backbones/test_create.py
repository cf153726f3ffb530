import argparse

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import WeightsEnum

from teamnet_pl import LeaderConfig, TeammateConfig
from teamnet_pl.backbones import (
    BackboneConfig,
    CifarResNet,
    WideResNet,
    create_backbone,
    default_input_shape,
)
from teamnet_pl.errors import TeamNetError
from tests.helpers.teams import assert_same_state


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("cifar/resnet20", {}, CifarResNet),
        ("cifar/resnet20", {"width": 4}, CifarResNet),
        ("cifar/resnet32x4", {"width": 2}, CifarResNet),
        ("cifar/wrn10_1", {"dropout": 0.1}, WideResNet),
        ("cifar/resnet18", {}, torchvision.models.ResNet),
        ("cifar/resnext50_32x4d", {}, torchvision.models.ResNet),
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
def test_every_form_of_name(own_nets, name, options, kind, channels):
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
    assert create("cifar/resnet20", num_classes=3).fc.out_features == 3  # options take precedence


@pytest.mark.parametrize("name", ["counts_classes", "takes_anything", "GroupNormNet"])
def test_an_imported_net_receives_the_arguments_that_it_accepts(own_nets, name):
    net = create_backbone(BackboneConfig(f"own_nets.{name}"), num_classes=7, in_channels=3)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def test_an_imported_net_never_keeps_another_number_of_classes():
    """This one accepts **kwargs but passes them to a net that has no number of channels."""
    with pytest.raises(ValueError, match="in_channels"):
        create_backbone(BackboneConfig("torchvision.models.resnet18"), 7, in_channels=3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_for_one_channel_the_first_convolution_is_summed(name):
    """The outputs for gray images are those of the original net for three equal channels."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, num_classes=7).eval()
    torch.manual_seed(0)
    net = create_backbone(BackboneConfig(f"torchvision/{name}"), 7, in_channels=1).eval()
    (first, *_), (original_first, *_) = (
        [m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (net, original)
    )
    assert first.in_channels == 1
    torch.testing.assert_close(first.weight, original_first.weight.sum(1, keepdim=True))
    gray = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(
        net(gray), original(gray.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4
    )
    assert first.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cifar/resnet21", "cifar/resnet20"),
        ("cifar/", "cifar/resnet"),
        ("cifar/wrn28", "cifar/wrn28_10"),
        ("cifar/resnet20x0", "cifar/resnet20x2"),
        ("cifar/resnet20x", "cifar/resnet20x2"),
        ("cifar/resnet19", "cifar/resnet18"),
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
def test_unknown_names_get_suggestions(name, meant):
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
def test_options_that_a_model_does_not_accept_are_refused(name):
    config = BackboneConfig(name, {"widht": 4})
    with pytest.raises(ValueError, match=f"{name} cannot be made with the options .*widht"):
        create_backbone(config, num_classes=7, in_channels=3)


def test_values_that_a_model_does_not_accept_are_refused():
    with pytest.raises(ValueError, match="6n"):
        create_backbone(BackboneConfig("teamnet_pl.backbones.CifarResNet", {"depth": 21}), 7, 3)


def test_resnet_for_small_images_keeps_their_resolution():
    net = create_backbone(BackboneConfig("cifar/resnet18"), num_classes=10, in_channels=3)
    # The number that pytorch-cifar by Kuang Liu, the best-known source, prints for its ResNet18.
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    shapes = []
    for layer in (net.layer1, net.layer4):
        layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1:]))
    net(torch.randn(2, 3, 32, 32))
    assert shapes == [(64, 32, 32), (512, 4, 4)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar/resnet20", (3, 32, 32)),
        ("torchvision/resnet50", (3, 224, 224)),
        ("timm/convnext_atto", (3, 224, 224)),
        ("timm/test_resnet", (3, 160, 160)),
        ("timm/test_resnet.r160_in1k", (3, 160, 160)),
        ("own_nets.GroupNormNet", (3, 224, 224)),
    ],
)
def test_default_input_shape(name, shape):
    assert default_input_shape(BackboneConfig(name)) == shape


# Pretrained weights


@pytest.fixture
def hub(monkeypatch):
    """Replaces downloads of torchvision's weights with weights made here; returns their URLs."""
    urls = []

    def get_state_dict(self, progress=True, check_hash=False):
        urls.append(self.url)
        name = type(self).__name__.removesuffix("_Weights").lower()
        torch.manual_seed(1)
        return torchvision.models.get_model(name, num_classes=1000).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return urls


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("num_classes", [7, 1000])
@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_of_torchvision(hub, name, num_classes, channels):
    config = BackboneConfig(f"torchvision/{name}", {"weights": "DEFAULT"})
    net = create_backbone(config, num_classes, in_channels=channels)
    assert hub == [torchvision.models.get_model_weights(name).DEFAULT.url]
    torch.manual_seed(1)
    expected = torchvision.models.get_model(name, num_classes=1000).state_dict()
    first = next(iter(expected))
    if channels == 1:
        expected[first] = expected[first].sum(1, keepdim=True)
    state = net.state_dict()
    head = {"resnet18": "fc.", "squeezenet1_1": "classifier.1."}[name]
    assert state.keys() == expected.keys()
    for key, value in state.items():
        if num_classes == 7 and key.startswith(head):
            assert len(value) == 7
        else:
            torch.testing.assert_close(value, expected[key])
    assert net.eval()(torch.randn(2, channels, 64, 64)).shape == (2, num_classes)


def test_unknown_weights_of_torchvision():
    config = BackboneConfig("torchvision/resnet50", {"weights": "IMAGENET1K_V3"})
    with pytest.raises(
        ValueError, match=r"no weights 'IMAGENET1K_V3'.*IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        create_backbone(config, num_classes=7, in_channels=3)


def test_weights_of_timm_in_a_local_file(tmp_path):
    """With an option of timm, which also adapts the numbers of classes and channels."""
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 1000}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    net = create_backbone(BackboneConfig("timm/test_resnet", options), 7, in_channels=1)
    torch.testing.assert_close(net.layer4.state_dict(), source.layer4.state_dict())
    torch.testing.assert_close(net.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))
    assert net.fc.out_features == 7


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("num_classes", [7, 10])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_weights_in_a_local_file(tmp_path, caplog, suffix, num_classes, channels):
    source, path = CifarResNet(20, num_classes=10, width=4), tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    config = BackboneConfig("cifar/resnet20", {"width": 4}, str(path))
    net = create_backbone(config, num_classes, channels)
    torch.testing.assert_close(net.layer1.state_dict(), source.layer1.state_dict())
    if channels == 3:
        torch.testing.assert_close(net.conv1.weight, source.conv1.weight)
    if channels == 1:
        torch.testing.assert_close(net.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(net.fc.weight[0], source.fc.weight[0]) == (num_classes == 10)
    warning = f"{path} is for 10 classes instead of 7: fc starts with new weights."
    assert caplog.messages == ([warning] if num_classes == 7 else [])


def averaged(net):
    model = AveragedModel(net)
    model.update_parameters(net)
    return model.state_dict()


def test_weights_in_a_checkpoint_of_a_training_script(tmp_path):
    """As scripts save them: beside their arguments, the last weights and their averages."""
    last, average = CifarResNet(20, width=4), CifarResNet(20, width=4)
    arguments = argparse.Namespace(model="resnet20", lr=0.1)
    saved = {
        "timm": {"state_dict": last.state_dict(), "state_dict_ema": average.state_dict()},
        "torchvision": {"model": last.state_dict(), "model_ema": averaged(average)},
        "parallel": {"model": nn.DataParallel(last).state_dict()},
        "compiled": {"state_dict": torch.compile(nn.DataParallel(last)).state_dict()},
        "team": {"state_dict": {f"leader.{k}": v for k, v in last.state_dict().items()}},
    }
    for name, content in saved.items():
        torch.save(content | {"args": arguments, "epoch": 3}, tmp_path / f"{name}.pth")

    def loaded(name, **options):
        config = BackboneConfig(
            "cifar/resnet20", {"width": 4}, str(tmp_path / f"{name}.pth"), **options
        )
        return create_backbone(config, num_classes=10, in_channels=3)

    for name in saved:
        prefix = {"checkpoint_prefix": "leader."} if name == "team" else {}
        assert_same_state(loaded(name, **prefix).state_dict(), last.state_dict())
    for name in ("timm", "torchvision"):
        net = loaded(name, checkpoint_averaged=True)
        assert_same_state(net.state_dict(), average.state_dict())
    with pytest.raises(TeamNetError, match=r"parallel.pth has no averaged weights .*: it has args"):
        loaded("parallel", checkpoint_averaged=True)
    with pytest.raises(TeamNetError, match=r"begin with 'leader\.': they begin with bn1, conv1"):
        loaded("timm", checkpoint_prefix="leader.")


def test_weights_without_a_classifier(tmp_path, caplog):
    source, path = CifarResNet(20, width=4), tmp_path / "weights.pth"
    weights = source.state_dict()
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc.")}, path)
    config = BackboneConfig("cifar/resnet20", {"width": 4}, str(path))
    net = create_backbone(config, num_classes=7, in_channels=3)
    assert_same_state(net.layer3.state_dict(), source.layer3.state_dict())
    assert caplog.messages == [
        f"{path} has no weights of the classifier: fc starts with new weights."
    ]
    torch.save({k: v for k, v in weights.items() if not k.startswith("layer1.")}, path)
    with pytest.raises(TeamNetError, match=r"(?s)do not fit.*Missing key.*layer1"):
        create_backbone(config, num_classes=10, in_channels=3)


@pytest.mark.fault("initial weights of another net", "The error names the file and the weights.")
def test_weights_of_another_width_are_refused(tmp_path):
    torch.save(CifarResNet(20, width=8).state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig("cifar/resnet20", {"width": 4}, str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match=r"(?s)do not fit cifar/resnet20.*mismatch for layer1"):
        create_backbone(config, num_classes=10, in_channels=3)


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [("resnet20", {}, 16), ("resnet20x2", {}, 32), ("resnet20x3", {"width": 4}, 12)],
)
def test_a_multiple_of_the_width(name, options, width):
    config = BackboneConfig(f"cifar/{name}", options)
    net = create_backbone(config, num_classes=3, in_channels=1)
    weights = CifarResNet(20, 3, 1, width).state_dict()
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert shapes == {key: value.shape for key, value in weights.items()}


def test_the_default_leader_is_wider_than_the_default_teammates():
    leader, teammate = LeaderConfig(), TeammateConfig()
    assert (leader.name, teammate.name) == ("cifar/resnet20x2", "cifar/resnet20")

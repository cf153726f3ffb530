import pytest

from tests.helpers.imports import packages_after

USES = {
    "import teamnet_pl.backbones": set(),
    "from teamnet_pl.backbones import BackboneConfig, create_backbone, default_input_shape": set(),
    "from teamnet_pl.backbones import CifarResNet": {"torchvision"},
    """
from teamnet_pl.backbones import BackboneConfig, create_backbone
create_backbone(BackboneConfig("torchvision/resnet18"), num_classes=2, in_channels=3)
""": {"torchvision"},
}


@pytest.mark.parametrize(("code", "expected"), USES.items())
def test_libraries_are_loaded_once_they_are_used(code, expected):
    assert packages_after(code) & {"timm", "torchvision"} == expected

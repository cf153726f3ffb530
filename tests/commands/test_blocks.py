import json

import pytest

from teamnet_pl.cli import main
from tests.helpers.runs import error_of


@pytest.fixture
def blocks(capsys):
    """Runs the command; returns its output."""

    def run(*words):
        main(["blocks", *words])
        return capsys.readouterr().out

    return run


def test_blocks_as_json(blocks):
    record = json.loads(
        blocks("--backbone", "torchvision/resnet50", "--json", "--depths", "[12,7]")
    )
    layers = {1: 3, 2: 4, 3: 6, 4: 3}
    names = [f"layer{layer}.{i}" for layer, size in layers.items() for i in range(1, size)]
    assert record["blocks"] == names
    assert record["stages"] == [2, 3, 5, 2]
    assert record["input_shape"] == [3, 224, 224]
    for rows in record["depths"].values():
        whole, shallow = rows
        # As in torchvision's documentation of ResNet-50.
        assert (whole["macs"], whole["parameters"]) == (4_089_184_256, 25_557_032)
        assert whole["kept"] == names
        assert (shallow["name"], len(shallow["kept"])) == ("d7", 7)
    last, first = (record["depths"][f"{side}_stage_first"][1] for side in ("last", "first"))
    assert last["kept"] == names[:7]
    assert first["kept"] == names[5:]
    # A bottleneck of layer 3 has 1.1 million parameters.
    assert whole["parameters"] - last["parameters"] == 3 * 1_117_184 + 2 * 4_462_592


def test_blocks_as_tables(blocks):
    words = "--backbone", "cifar/resnet20", "--num_classes", "5", "--input_shape", "[1,16,16]"
    lines = blocks(*words).splitlines()
    assert "cifar/resnet20, images of 1x16x16" in lines[0]
    assert any("layer1.0, layer1.1, layer1.2" in line for line in lines)
    shallowest = [line for line in lines if " d0 " in line]
    assert len(shallowest) == 4  # policies
    assert all(" 0-0-0 " in line for line in shallowest)


def test_patterns_and_options_reach_the_net(blocks):
    words = ["--backbone", "cifar/resnet20", "--blocks+", "layer3.*", "--options", "{width: 8}"]
    record = json.loads(blocks(*words, "--json", "--num_classes", "10"))
    assert record["blocks"] == ["layer3.1", "layer3.2"]
    assert [row["name"] for row in record["depths"]["round_robin"]] == ["d2", "d1", "d0"]
    assert record["depths"]["round_robin"][0]["parameters"] == 68_786


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "timm/resnet8"], "Did you mean"),
        (["--backbone", "torchvision/alexnet"], "has no residual block"),
        (["--backbone", "cifar/resnet20", "--depths", "9"], "it has 2 to 8 depths"),
        (["--bakbone", "cifar/resnet20"], "Did you mean backbone?"),
        ([], "backbone"),
    ],
)
def test_wrong_arguments_are_explained(capsys, words, message):
    assert message in error_of(capsys, main, ["blocks", *words])


def test_help_lists_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Prints a backbone's skippable blocks" in " ".join(capsys.readouterr().out.split())

import json
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_model

from teamnet_pl import TeammateConfig
from teamnet_pl.backbones import CifarResNet
from teamnet_pl.data import Digits
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.deploy import Teammate, export_files, onnx_accuracy
from teamnet_pl.elastic import depth_costs
from tests.helpers.deploy import logits_at, make_teammate, run_onnx

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PREPROCESSING = PreprocessingConfig([1, 8, 8], [0.3], [0.2])
CLASSES = [f"digit {digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def teammate():
    config = TeammateConfig(options={"width": 4}, depths=[[3, 2, 2], [2, 1, 1]])
    return make_teammate(config, PREPROCESSING, CLASSES, {"d7": 0.75}, "val")


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_files_and_manifest(teammate, images, tmp_path):
    formats = ["onnx_all_depths", "safetensors", "torch_export", "onnx", "hub"]
    manifest = export_files(teammate, tmp_path / "new/folder", formats)
    folder = tmp_path / "new/folder"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    depths = manifest.pop("depths")
    assert manifest.pop("files")["hub"] == {"path": "hub"}
    assert manifest == {
        "backbone": "cifar/resnet20",
        "num_classes": 10,
        "input_shape": [1, 8, 8],
        "preprocessing": asdict(PREPROCESSING),
        "classes": CLASSES,
        "accuracy_split": "val",
    }
    costs = depth_costs(teammate, (1, 8, 8))
    assert [depth["name"] for depth in depths] == ["d7", "d4"]
    expected = {"d7": ([3, 2, 2], 0.75, 20), "d4": ([2, 1, 1], None, 14)}
    for depth in depths:
        stages, accuracy, layers = expected[depth["name"]]
        name = depth["name"]
        assert depth["blocks_per_stage"] == stages
        assert (depth["macs"], depth["parameters"]) == (costs[name].macs, costs[name].parameters)
        assert depth["accuracy"] == accuracy
        for entry in depth["files"].values():
            assert (folder / entry["path"]).stat().st_size == entry["bytes"]
        files = {kind: folder / entry["path"] for kind, entry in depth["files"].items()}
        logits = logits_at(teammate, name, images)

        plain = CifarResNet(layers, num_classes=10, in_channels=1, width=4).eval()
        load_model(plain, files["safetensors"], strict=True)
        with torch.no_grad():
            close(plain(images), logits)
        close(torch.export.load(files["torch_export"]).module()(images), logits)
        close(run_onnx(files["onnx"], images), logits)
        close(run_onnx(folder / "all_depths.onnx", images, depth=depth["num_blocks"]), logits)
    with torch.no_grad():
        hub = Teammate.from_pretrained(folder / "hub")
        assert torch.equal(hub.packed(images), teammate.packed(images))


def test_some_depths(teammate, tmp_path):
    manifest = export_files(teammate, tmp_path, ["safetensors"], [4])
    assert [depth["name"] for depth in manifest["depths"]] == ["d4"]
    assert {path.name for path in tmp_path.iterdir()} == {"d4.safetensors", "manifest.json"}


def test_8_bit_files_and_their_accuracy(teammate, tmp_path):
    data = Digits(batch_size=32)
    manifest = export_files(teammate, tmp_path, ["onnx_int8", "onnx"], [4], data)
    (depth,) = manifest["depths"]
    entry = depth["files"]["onnx_int8"]
    assert entry["path"] == "d4.int8.onnx"
    data.setup("test")
    for name, file in {"test_accuracy": "d4.int8.onnx", "test_accuracy_before": "d4.onnx"}.items():
        batches = [(data.normalize(batch), labels) for batch, labels in data.test_dataloader()]
        assert entry[name] == onnx_accuracy(tmp_path / file, batches)


@pytest.mark.parametrize(
    ("count", "expected"), [(32, [32]), (33, [32, 32]), (1000, [32] * 4 + [16])]
)
def test_number_of_calibration_images(teammate, tmp_path, monkeypatch, count, expected):
    seen = []
    data = Digits(batch_size=32)

    def save(source, path, images):
        seen.extend(images)
        path.write_bytes(source.read_bytes())

    for name, stand_in in {
        "save_onnx": lambda net, depth, path: path.touch(),
        "save_onnx_int8": save,
        "onnx_accuracy": lambda path, batches: 0.5,
    }.items():
        monkeypatch.setattr(f"teamnet_pl.deploy.export.files.{name}", stand_in)
    export_files(teammate, tmp_path, ["onnx_int8"], [4], data, count)
    assert list(map(len, seen)) == expected
    data.setup("validate")
    for batch, (images, _) in zip(seen, data.val_dataloader(), strict=False):
        assert torch.equal(batch, data.normalize(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "No format is given: choose from safetensors, torch_export"),
        ((["onxx"],), "There is no format onxx: choose from safetensors"),
        ((["onnx"], [5]), "has the depths d7, d4; 5 is none of them"),
        ((["safetensors", "onnx_all_depths"], [4]), "at least two of them, found 1"),
        ((["onnx_int8"],), "does not say what it was trained on"),
        ((["onnx_int8"], None, Digits(), 0), "calibration_images must be at least 1, found 0"),
    ],
)
def test_mistakes_are_reported_before_a_file_is_written(teammate, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_files(teammate, tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "a missing library that an export needs",
    "The error names the extra to install; no file is written.",
)
@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [
        ("onnx", "onnxscript", "onnx"),
        ("onnx_all_depths", "onnxscript", "onnx"),
        ("onnx_int8", "onnxruntime", "onnx"),
        ("executorch", "executorch", "executorch"),
    ],
)
def test_library_that_is_not_installed(teammate, tmp_path, monkeypatch, kind, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{library}.*pip install .*\[{extra}\]"):
        export_files(teammate, tmp_path, ["safetensors", kind], data=Digits())
    assert list(tmp_path.iterdir()) == []

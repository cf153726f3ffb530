import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from teamnet_pl.data import MedMNIST
from tests.helpers.images import pixels
from tests.helpers.runs import error_of

CONFIGS = Path(__file__).parents[2] / "configs/data"


@pytest.mark.parametrize(
    ("name", "size", "classes", "channels"),
    [("pathmnist", 28, 9, 3), ("breastmnist", 64, 2, 1), ("retinamnist", 28, 5, 3)],
)
def test_images_and_labels_of_each_split(on_disk, name, size, classes, channels):
    data = MedMNIST(root=on_disk.medmnist(name, size), name=name, size=size, download=False)
    assert data.num_classes == classes
    assert data.input_shape == (channels, size, size)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    for seed, (subset, count) in enumerate(
        ((data.train_set, 30), (data.val_set, 10), (data.test_set, 12))
    ):
        images, labels = zip(*subset, strict=True)
        truth = pixels(count, size, channels, seed).reshape(count, size, size, channels)
        np.testing.assert_array_equal(torch.stack(images), truth.transpose(0, 3, 1, 2))
        assert [int(label) for label in labels] == [i % classes for i in range(count)]


def test_download(on_disk, file_server, tmp_path, monkeypatch):
    from medmnist import INFO

    address = file_server.start(on_disk.medmnist())
    monkeypatch.setitem(INFO["pathmnist"], "url", f"{address}/pathmnist.npz")
    data = MedMNIST(root=tmp_path / "new")
    data.prepare_data()
    data.setup("test")
    assert len(data.test_set) == 12
    monkeypatch.setitem(INFO["pathmnist"], "MD5", "0" * 32)
    with pytest.raises(FileNotFoundError, match=r"new2 .*pathmnist.npz.*download failed"):
        MedMNIST(root=tmp_path / "new2").prepare_data()
    with pytest.raises(ValueError, match=r"pathmnist.npz is damaged"):
        data.setup("test")


@pytest.mark.fault("a missing file of MedMNIST", "The error names it.")
def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} .missing: bloodmnist_128.npz"):
        MedMNIST(root=tmp_path, name="bloodmnist", size=128, download=False).prepare_data()


@pytest.mark.parametrize("name", ["chestmnist", "organmnist3d", "mnist"])
def test_datasets_in_3d_or_with_several_labels_are_refused(name):
    with pytest.raises(ValueError, match=f"one of pathmnist, .*found '{name}'"):
        MedMNIST(name=name)


@pytest.mark.fault("a missing optional library", "One sentence names the extra to install.")
@pytest.mark.parametrize(
    ("module", "extra", "options"),
    [
        ("medmnist", "medmnist", ["--data", "MedMNIST"]),
        ("datasets", "huggingface", ["--data", "HuggingFace", "--data.path", "any"]),
        ("litdata", "litdata", ["--config", CONFIGS / "litdata.yaml"]),
        ("webdataset", "webdataset", ["--config", CONFIGS / "shards.yaml"]),
    ],
)
def test_a_missing_library_is_named(cli, capsys, tmp_path, monkeypatch, module, extra, options):
    monkeypatch.setitem(sys.modules, module, None)
    message = error_of(capsys, cli, tmp_path, "fit", *options)
    assert f"needs {module}, which is not installed: pip install 'teamnet_pl[{extra}]'" in message

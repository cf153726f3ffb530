import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from teamnet_pl.data import EMNIST, MNIST, FashionMNIST
from tests.helpers import images as noise
from tests.helpers.datasets import idx, md5, write_files

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def arrays(split: str, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split."""
    count = {"train": 100, "test": 30}[split]
    return noise.pixels(count, size, 1).astype(int), np.arange(count) % 10


def write(folder: Path, name: str, content: bytes, gz: bool) -> None:
    files = {f"{name}.gz": gzip.compress(content, 1)} if gz else {name: content}
    write_files(folder, files)


def write_all(folder: Path, gz: bool = False, size: int = 28) -> Path:
    for split in ("train", "test"):
        images, labels = arrays(split, size)
        write(folder, IMAGES[split], idx(images), gz)
        write(folder, LABELS[split], idx(labels), gz)
    return folder


def fashion(root: Path, **kwargs) -> FashionMNIST:
    data = FashionMNIST(root=root, download=False, train_transform=[], **kwargs)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def pixels(images: torch.Tensor) -> np.ndarray:
    assert images.shape[1:] == (1, 28, 28)
    assert images.dtype == torch.uint8
    return images[:, 0].numpy().astype(int)


def assert_holds_the_arrays(data: FashionMNIST) -> None:
    ((images, labels),) = data.test_dataloader()
    np.testing.assert_array_equal(pixels(images), arrays("test")[0])
    np.testing.assert_array_equal(labels, arrays("test")[1])
    seen = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for images, labels in loader:
            for image, label in zip(pixels(images), labels.tolist(), strict=True):
                seen[image.tobytes()] = label
    truth = {
        image.tobytes(): label for image, label in zip(*map(list, arrays("train")), strict=True)
    }
    assert seen == truth


# Files


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_pixels_and_labels(tmp_path, gz, layout):
    write_all(tmp_path / layout, gz)
    before = sorted(tmp_path.rglob("*"))
    data = fashion(tmp_path, val_fraction=0.2)
    assert_holds_the_arrays(data)
    assert np.bincount([data.val_set[i][1] for i in range(20)]).tolist() == [2] * 10
    assert sorted(tmp_path.rglob("*")) == before  # root may be read-only


def test_plain_and_gzipped_files_together(tmp_path):
    write_all(tmp_path, gz=True)
    write(tmp_path, IMAGES["train"], idx(arrays("train")[0]), gz=False)
    (tmp_path / f"{IMAGES['train']}.gz").unlink()
    assert_holds_the_arrays(fashion(tmp_path))


def test_home_folder_in_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_all(tmp_path / "clothes")
    assert_holds_the_arrays(fashion("~/clothes"))


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_package():
    data = fashion(DEBIAN)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (54000, 6000, 10000)
    content = gzip.decompress((DEBIAN / f"{IMAGES['train']}.gz").read_bytes())
    raw = np.frombuffer(content[16:], np.uint8) / 255
    assert FashionMNIST.mean[0] == pytest.approx(raw.mean(), abs=1e-4)
    assert FashionMNIST.std[0] == pytest.approx(raw.std(), abs=1e-4)


def test_standard_augmentation_crops_and_flips(tmp_path):
    write_all(tmp_path)
    plain = fashion(tmp_path)
    data = FashionMNIST(root=tmp_path)
    data.setup("fit")
    torch.manual_seed(0)
    shifts, flips = set(), set()
    for i in range(len(data.train_set)):
        padded = np.pad(plain.train_set[i][0][0].numpy(), 2)
        image = data.train_set[i][0][0].numpy()
        ((top, left, flip),) = (
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (1, -1)
            if np.array_equal(padded[top : top + 28, left : left + 28][:, ::flip], image)
        )
        shifts.add((top, left))
        flips.add(flip)
    assert len(shifts) > 15
    assert flips == {1, -1}


# The others


def test_mnist_crops_but_does_not_flip(tmp_path):
    write_all(tmp_path)
    data = MNIST(root=tmp_path, download=False)
    data.setup("test")
    ((images, labels),) = data.test_dataloader()
    np.testing.assert_array_equal(pixels(images), arrays("test")[0])
    np.testing.assert_array_equal(labels, arrays("test")[1])
    data.setup("fit")
    plain = MNIST(root=tmp_path, download=False, train_transform=[])
    plain.setup("fit")
    shifts = set()
    for i in range(len(data.train_set)):
        padded = np.pad(plain.train_set[i][0][0].numpy(), 2)
        image = data.train_set[i][0][0].numpy()
        ((top, left),) = (
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(padded[top : top + 28, left : left + 28], image)
        )
        shifts.add((top, left))
    assert len(shifts) > 15


@pytest.mark.parametrize(
    ("variant", "classes", "first"),
    [
        ("byclass", 62, 0),
        ("bymerge", 47, 0),
        ("balanced", 47, 0),
        ("letters", 26, 1),
        ("digits", 10, 0),
        ("mnist", 10, 0),
    ],
)
def test_emnist(on_disk, variant, classes, first):
    data = EMNIST(root=on_disk.emnist(variant, classes, first), variant=variant)
    assert data.num_classes == classes
    data.prepare_data()
    data.setup("test")
    ((images, labels),) = data.test_dataloader()
    truth = noise.pixels(classes, 28, 1).transpose(0, 2, 1)  # the files hold them transposed
    np.testing.assert_array_equal(pixels(images), truth)
    assert labels.tolist() == list(range(classes))


# Download


@pytest.fixture
def mirror(tmp_path, monkeypatch, file_server, on_disk):
    """A web server with the files, in place of torchvision's mirror."""
    folder = write_all(tmp_path / "mirror", gz=True)
    sums = [(path.name, md5(path)) for path in sorted(folder.iterdir())]
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [file_server.start(folder) + "/"])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    return folder


def test_download(tmp_path, mirror):
    root = tmp_path / "new"
    FashionMNIST(root=root).prepare_data()
    for path in mirror.iterdir():
        path.unlink()
    FashionMNIST(root=root).prepare_data()  # nothing left to download: it was kept
    assert (root / "FashionMNIST" / "raw").is_dir()
    assert_holds_the_arrays(fashion(root))


@pytest.mark.fault("a failed download", "The error names the files, and why each source failed.")
def test_a_failed_download_names_the_missing_files_and_the_reason(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError) as error:
        FashionMNIST(root=tmp_path / "new").prepare_data()
    for part in (
        str(tmp_path / "new"),
        LABELS["test"],
        "download failed",
        "127.0.0.1:9",
        "refused",
    ):
        assert part in str(error.value)


@pytest.mark.fault("a damaged download", "It is refused by its checksum.")
def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, mirror):
    (mirror / f"{LABELS['test']}.gz").write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match=r"download failed(.|\n)*corrupted"):
        FashionMNIST(root=tmp_path / "new").prepare_data()


# Errors


@pytest.mark.fault("missing files of MNIST", "The error names the files and the folder.")
@pytest.mark.parametrize("call", [FashionMNIST.prepare_data, lambda data: data.setup("fit")])
def test_missing_files(tmp_path, mirror, call):
    write(tmp_path, LABELS["train"], b"", gz=True)
    with pytest.raises(FileNotFoundError) as error:
        call(FashionMNIST(root=tmp_path, download=False))
    message = str(error.value)
    inner, outer = message.split(" or in ")
    assert str(tmp_path / "FashionMNIST" / "raw") in inner
    for name in (*IMAGES.values(), LABELS["test"]):
        assert name in inner
        assert name in outer
    assert LABELS["train"] in inner
    assert LABELS["train"] not in outer
    assert "download=True" in message
    assert not (tmp_path / "FashionMNIST").exists()


GOOD = idx(arrays("train")[0])


@pytest.mark.fault("a damaged file of MNIST", "The error names the file.")
@pytest.mark.parametrize(
    ("content", "gz"),
    [
        pytest.param(GOOD[:-1], False, id="cut"),
        pytest.param(GOOD[:-1], True, id="cut, gzipped"),
        pytest.param(GOOD[:16], False, id="header only"),
        pytest.param(GOOD[:9], False, id="header cut"),
        pytest.param(b"", False, id="empty"),
        pytest.param(GOOD + b"1", False, id="too long"),
        pytest.param(b"<html>404 Not Found</html>", False, id="web page"),
        pytest.param(b"\0\0\x0a\3" + GOOD[4:], False, id="unknown type"),
        pytest.param(b"\0\0\x0d\3" + GOOD[4:], False, id="floats"),
        pytest.param(b"\0\0\x09\3" + GOOD[4:], False, id="signed"),
        pytest.param(idx(arrays("train")[1]), False, id="labels"),
    ],
)
def test_damaged_images_are_named(tmp_path, content, gz):
    write_all(tmp_path, gz)
    write(tmp_path, IMAGES["train"], content, gz)
    with pytest.raises(
        ValueError, match=f"{IMAGES['train']}.* is truncated or is not the expected"
    ):
        fashion(tmp_path)


@pytest.mark.fault("a damaged or truncated gzip file of MNIST", "The error names the file.")
@pytest.mark.parametrize(
    "damage",
    [lambda gz: gz[:-9], lambda gz: b"no gzip", lambda gz: gz[:10] + b"\xff" + gz[11:]],
    ids=["cut", "other format", "overwritten"],
)
def test_damaged_gzip_is_named(tmp_path, damage):
    write_all(tmp_path, gz=True)
    path = tmp_path / f"{LABELS['train']}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is truncated or is not the expected"):
        fashion(tmp_path)


def test_counts_of_images_and_labels_differ(tmp_path):
    write_all(tmp_path)
    write(tmp_path, LABELS["train"], idx(arrays("train")[1][:-1]), gz=False)
    with pytest.raises(ValueError, match=r"100 images but .*train-labels.* 99 labels"):
        fashion(tmp_path)


def test_labels_out_of_range(tmp_path):
    write_all(tmp_path)
    write(tmp_path, LABELS["train"], idx(arrays("train")[1] + 1), gz=False)
    with pytest.raises(ValueError, match=r"training split: labels must be in 0..9, found \[10\]"):
        fashion(tmp_path)


def test_images_of_another_size(tmp_path):
    write_all(tmp_path, size=32)
    with pytest.raises(ValueError, match=r"\(1, 32, 32\).*input_shape is \(1, 28, 28\)"):
        FashionMNIST(root=tmp_path).setup("fit")

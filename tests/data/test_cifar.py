import os

import lightning.pytorch as pl
import numpy as np
import pytest
from torchvision import datasets

from teamnet_pl.data import CIFAR10, CIFAR100, SVHN
from tests.helpers.images import pixels
from tests.helpers.teams import make_trainer


def served(dataset):
    images, labels = zip(*dataset, strict=True)
    return np.stack([image.numpy() for image in images]), [int(label) for label in labels]


def truth(on_disk, name):
    """Images (N, 3, 32, 32) and labels of the training and of the test split, as written."""

    def channels_first(images):
        return np.concatenate(images).transpose(0, 3, 1, 2)

    if name == "cifar10":
        train = channels_first([pixels(10, 32, seed=i) for i in range(5)])
        test = channels_first([pixels(10, 32, seed=5)])
        return (train, [*range(10)] * 5), (test, [*range(10)])
    if name == "cifar100":
        train = channels_first([pixels(400, 32, seed=0)])
        test = channels_first([pixels(100, 32, seed=1)])
        return (train, [*range(100)] * 4), (test, [*range(100)])
    # The labels 1..10 in the files are the digits 1..9 and 0.
    digits = [*range(1, 10), 0]
    train, test = (channels_first([pixels(count, 32)]) for count in (60, 20))
    return (train, digits * 6), (test, digits * 2)


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100, SVHN])
def test_images_and_labels(on_disk, cls):
    name = cls.__name__.lower()
    data = cls(root=getattr(on_disk, name)(), val_fraction=0.25)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    train, test = truth(on_disk, name)
    for subset in (data.train_set, data.val_set):
        subset.transform.transforms = subset.transform.transforms[:1]  # no augmentation
        images, labels = served(subset)
        np.testing.assert_array_equal(images, train[0][subset.indices])
        assert labels == [train[1][i] for i in subset.indices]
    images, labels = served(data.test_set)
    np.testing.assert_array_equal(images, test[0])
    assert labels == test[1]


@pytest.mark.parametrize("cls", [CIFAR10, SVHN])
def test_standard_augmentation(on_disk, cls):
    data = cls(root=getattr(on_disk, cls.__name__.lower())(), val_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    (images, _), _ = truth(on_disk, cls.__name__.lower())
    shifts, flips = set(), set()
    for i, index in enumerate(data.train_set.indices):
        padded = np.pad(images[index], ((0, 0), (4, 4), (4, 4)))
        image = data.train_set[i][0].numpy()
        ((top, left, flip),) = (
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(padded[:, top : top + 32, left : left + 32][..., ::flip], image)
        )
        shifts.add((top, left))
        flips.add(flip)
    if cls is SVHN:
        assert (shifts, flips) == ({(4, 4)}, {1})
    else:
        assert len(shifts) > 15
        assert flips == {1, -1}


@pytest.mark.fault("missing files of CIFAR or SVHN", "The error names the files and the folder.")
@pytest.mark.parametrize(
    ("cls", "folder", "name"),
    [
        (CIFAR10, "cifar-10-batches-py", "data_batch_3"),
        (CIFAR100, "cifar-100-python", "train"),
        (SVHN, "", "train_32x32.mat"),
    ],
)
@pytest.mark.parametrize("call", [lambda data: data.prepare_data(), lambda data: data.setup("fit")])
def test_missing_files(on_disk, cls, folder, name, call):
    root = getattr(on_disk, cls.__name__.lower())()
    cls(root=root).prepare_data()
    (root / folder / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        call(cls(root=root, download=False))
    assert f"{cls.__name__} is not in {root / folder} (missing: {name})" in str(error.value)


@pytest.mark.fault(
    "a damaged file of CIFAR, which is a pickle",
    "Its checksum is checked first, so it is refused before it is unpickled.",
)
@pytest.mark.parametrize(
    ("cls", "name"), [(CIFAR10, "cifar-10-batches-py/data_batch_2"), (SVHN, "train_32x32.mat")]
)
def test_a_damaged_file_is_never_read(on_disk, cls, name, monkeypatch):
    root = getattr(on_disk, cls.__name__.lower())()
    data = cls(root=root)
    data.prepare_data()
    with (root / name).open("ab") as file:
        file.write(b"more")
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("scipy.io.loadmat", None)
    with pytest.raises(ValueError, match=f"{name}.* is damaged, by its checksum"):
        data.setup("fit")


def test_download(on_disk, file_server, tmp_path, monkeypatch):
    mirror = on_disk.cifar10()
    monkeypatch.setattr(
        datasets.CIFAR10, "url", f"{file_server.start(mirror)}/cifar-10-python.tar.gz"
    )
    data = CIFAR10(root=tmp_path / "new", val_fraction=0.25)
    data.prepare_data()
    (mirror / "cifar-10-python.tar.gz").write_bytes(b"another")
    data.prepare_data()  # nothing left to download
    data.setup("test")
    assert len(data.test_set) == 10
    with pytest.raises(FileNotFoundError, match=r"new2.*download failed.*corrupted"):
        CIFAR10(root=tmp_path / "new2").prepare_data()


class LabelCounter(pl.LightningModule):
    def predict_step(self, batch, _):
        return len(batch[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_one_of_two_processes_downloads(on_disk, file_server, tmp_path, monkeypatch):
    address = file_server.start(on_disk.cifar10())
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    trainer = make_trainer(tmp_path, devices=2, strategy="ddp_fork")
    trainer.predict(
        LabelCounter(), datamodule=CIFAR10(root=tmp_path / "two"), return_predictions=False
    )
    both = list(file_server.requests)
    file_server.requests.clear()
    CIFAR10(root=tmp_path / "one").prepare_data()
    assert file_server.requests == both != []


def test_a_label_out_of_range(on_disk, monkeypatch):
    data = CIFAR10(root=on_disk.cifar10())
    data.prepare_data()
    monkeypatch.setattr(CIFAR10, "num_classes", 7)
    with pytest.raises(ValueError, match=r"CIFAR10, training .* 0..6, found \[7, 8, 9\]"):
        data.setup("fit")

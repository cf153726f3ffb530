import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teamnet_pl.data import Digits, ImageFolder, ImageNet, Imagenette, TinyImageNet
from tests.helpers.datasets import make_photos
from tests.helpers.images import encoded, pixels


def prepared(on_disk, cls, stage, **kwargs):
    name = {ImageNet: "imagenet", Imagenette: "imagenette", TinyImageNet: "tiny_imagenet"}[cls]
    data = cls(root=getattr(on_disk, name)(), val_fraction=0.25, **kwargs)
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.mark.parametrize("cls", [ImageNet, Imagenette])
@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("test", "val")])
def test_labels_are_the_positions_of_the_sorted_ids(on_disk, cls, stage, split):
    data = prepared(on_disk, cls, stage, image_size=32)
    dataset = (data.train_set if stage == "fit" else data.test_set).dataset
    photos = make_photos({"train": 8, "val": 3})
    truth = {
        Image.open(io.BytesIO(content)).convert("RGB").tobytes(): int(name.split("/")[1][2])
        for name, content in photos.items()
        if name.startswith(split)
    }
    assert len(dataset) == len(truth)
    for image, label in (dataset[i] for i in range(len(dataset))):
        assert truth[image.tobytes()] == label + 1


def test_tiny_imagenet(on_disk):
    data = prepared(on_disk, TinyImageNet, "fit")
    assert np.bincount(data.train_set.dataset.labels).tolist() == [8, 8, 8]
    assert (len(data.train_set), len(data.val_set)) == (18, 6)
    data.setup("test")
    for j in range(9):
        image, label = data.test_set.dataset[j]
        content = encoded(pixels(1, 64, seed=90 + j)[0], "JPEG")
        np.testing.assert_array_equal(image, Image.open(io.BytesIO(content)))
        assert label == (2 * j) % 3


def test_tiny_imagenet_at_another_size(on_disk):
    data = prepared(on_disk, TinyImageNet, "fit", image_size=32)
    assert data.input_shape == data.train_set[0][0].shape == data.val_set[0][0].shape == (3, 32, 32)


def test_tiny_imagenet_annotations_of_another_class(on_disk):
    data = prepared(on_disk, TinyImageNet, "fit")
    path = data.root / "tiny-imagenet-200/val/val_annotations.txt"
    path.write_text(path.read_text().replace("n03", "n99"))
    with pytest.raises(ValueError, match=r"val_annotations.txt names classes .*: n99"):
        data.setup("test")


def test_tiny_imagenet_is_downloaded(on_disk, file_server, tmp_path, monkeypatch):
    address = file_server.start(on_disk.tiny_imagenet())
    monkeypatch.setattr(TinyImageNet, "archive", f"{address}/tiny-imagenet-200.zip")
    data = TinyImageNet(root=tmp_path / "new")
    data.prepare_data()
    data.setup("test")
    assert len(data.test_set) == 9
    monkeypatch.setattr(TinyImageNet, "md5", "0" * 32)
    with pytest.raises(FileNotFoundError, match=r"new2.*download failed.*corrupted"):
        TinyImageNet(root=tmp_path / "new2").prepare_data()


@pytest.mark.fault(
    "a damaged archive of ImageNet", "It is refused by its checksum; nothing is unpacked."
)
def test_imagenet_is_unpacked_once_and_by_checksum(on_disk):
    data = prepared(on_disk, ImageNet, "fit")
    for path in data.root.glob("*.tar"):
        path.unlink()
    data.prepare_data()
    (data.root / "val").rename(data.root / "kept")
    (data.root / "ILSVRC2012_img_val.tar").write_bytes(b"another")
    with pytest.raises(FileNotFoundError, match=r"val images .* ILSVRC2012_img_val.tar is not pre"):
        data.prepare_data()


@pytest.mark.parametrize("cls", [ImageNet, Imagenette, TinyImageNet])
@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("test", "val")])
def test_missing_images(on_disk, cls, stage, split):
    data = prepared(on_disk, cls, stage)
    on_disk.patch.setattr(cls, "images", {"train": 25, "test": 10})
    with pytest.raises(ValueError, match=rf"{split}.* has (24|9) images, not (25|10): delete it"):
        data.setup(stage)


def test_imagenet_of_other_classes(on_disk, monkeypatch):
    data = prepared(on_disk, ImageNet, "test")
    monkeypatch.setattr(ImageNet, "num_classes", 1000)
    with pytest.raises(ValueError, match="train has 3 folders, not 1000"):
        data.setup("fit")


@pytest.mark.fault(
    "missing files of ImageNet, Imagenette or Tiny ImageNet",
    "The error names them and says how to get them.",
)
@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (ImageNet, ["train", "ILSVRC2012_devkit_t12.tar.gz"]),
        (Imagenette, ["imagenette2-160/train", "imagenette2-160/val"]),
        (TinyImageNet, ["tiny-imagenet-200", "val/val_annotations.txt"]),
    ],
)
def test_missing_files(cls, names, tmp_path):
    options = {} if cls is ImageNet else {"download": False}
    with pytest.raises(FileNotFoundError) as error:
        cls(root=tmp_path, **options).prepare_data()
    for part in (str(tmp_path), *names):
        assert part in str(error.value)


def test_versions_of_imagenette():
    names = {version: Imagenette(version=version).names for version in ("full", "320px", "160px")}
    assert [names[version][0] for version in names] == [
        "imagenette2/train",
        "imagenette2-320/train",
        "imagenette2-160/train",
    ]


@pytest.mark.parametrize(("cls", "least"), [(ImageNet, 0.08), (Imagenette, 0.35)])
def test_the_recipe_crops_and_flips(on_disk, cls, least):
    data = prepared(on_disk, cls, "fit", image_size=32)
    crop, flip = data.default_train_transform()
    assert crop.scale == (least, 1)
    # A ramp from left to right shows how much of the width is kept and whether it is flipped.
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    rows = [np.asarray(flip(crop(ramp))).astype(int)[0] for _ in range(200)]
    assert {np.sign(row[-1] - row[0]) for row in rows} == {1, -1}
    kept = [abs(row[-1] - row[0]) / 255 for row in rows]
    assert min(kept) > (least * 3 / 4) ** 0.5 - 0.05
    assert min(kept) < (least * 3 / 4) ** 0.5 + 0.2
    assert max(kept) > 0.9


def test_image_size_out_of_range():
    with pytest.raises(ValueError, match="image_size must be at least 1, found 0"):
        ImageNet(image_size=0)


@pytest.mark.fault(
    "hidden files and folders of other systems", "They are not taken for classes or images."
)
def test_hidden_files_and_folders_do_not_count(on_disk):
    root = on_disk.image_folder()
    expected = ImageFolder(root=root, image_size=32)
    for split in ("train", "val", "test"):
        name = expected.classes[0]
        image = next((root / split / name).iterdir())
        for folder in (".cache", ".ipynb_checkpoints", "__MACOSX", f"{name}/.ipynb_checkpoints"):
            (root / split / folder).mkdir()
            (root / split / folder / "copy.png").write_bytes(image.read_bytes())
        (root / split / name / "._copy.png").write_bytes(b"of a Mac")
        (root / split / name / ".DS_Store").write_bytes(b"of a Mac")
        (root / split / name / "Thumbs.db").write_bytes(b"of Windows")
    data = ImageFolder(root=root, image_size=32)
    assert data.classes == expected.classes
    for split in ("train", "val", "test"):
        assert data.load_split(split)[1] == expected.load_split(split)[1]


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_other_names_of_the_validation_folder(on_disk, name, caplog):
    root = on_disk.image_folder()
    (root / "val").rename(root / name)
    data = ImageFolder(root=root, image_size=32)
    with caplog.at_level("INFO"):
        data.setup("fit")
    images, _ = data.load_split("val")
    assert {Path(os.fsdecode(path)).parts[-3] for path in images.paths} == {name}
    assert f"from the folder {root / name}" in caplog.text
    (root / "val").mkdir()
    with pytest.raises(ValueError, match=rf"has the folders val and {name}: set val"):
        ImageFolder(root=root)
    assert ImageFolder(root=root, val=name, image_size=32).has_val


def test_the_source_of_the_validation_images_is_logged(caplog):
    with caplog.at_level("INFO"):
        Digits(val_fraction=0.25).setup("fit")
    assert "from a share of 0.25 of the training split" in caplog.text

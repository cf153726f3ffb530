import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from teamnet_pl.data import HuggingFace
from teamnet_pl.data.loading import UnreadableImageError
from tests.helpers.images import pixels


def test_images_and_labels_of_each_split(on_disk):
    data = HuggingFace(path=str(on_disk.parquet()), train_transform=[])
    assert data.num_classes == 3
    assert data.input_shape == (3, 24, 24)
    for stage in ("fit", "test"):
        data.setup(stage)
    for seed, (subset, count) in enumerate(
        ((data.train_set, 30), (data.val_set, 10), (data.test_set, 12))
    ):
        images, labels = zip(*subset, strict=True)
        truth = pixels(count, 24, seed=seed).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(np.stack([image.numpy() for image in images]), truth)
        assert list(labels) == [i % 3 for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("int64", lambda count: [(2 * i) % 5 for i in range(count)]),
        ("string", lambda count: ["edcba"[i % 5] for i in range(count)]),
    ],
)
def test_labels_without_classes(on_disk, kind, labels):
    data = HuggingFace(path=str(on_disk.parquet(labels, kind)))
    assert data.num_classes == 5
    data.setup("test")
    expected = labels(12) if kind == "int64" else ["abcde".index(text) for text in labels(12)]
    assert [int(label) for _, label in data.test_set] == expected


def test_splits_and_columns_are_named(on_disk):
    root = str(on_disk.parquet(more=["coarse"], splits=("train", "test")))
    with pytest.raises(ValueError, match=r"Set label_column to one of .* coarse \(ClassLabel\)"):
        HuggingFace(path=root)
    data = HuggingFace(path=root, label_column="coarse", val_fraction=0.2)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (24, 6)
    other = HuggingFace(path=root, label_column="label", test="dev")
    with pytest.raises(ValueError, match=r"no split 'dev', only train, test: set test"):
        other.setup("test")
    with pytest.raises(ValueError, match=r"Set image_column .* found image"):
        HuggingFace(path=root, label_column="label", image_column="image")
    with pytest.raises(ValueError, match=r"no split 'all', only train, test: set train"):
        HuggingFace(path=root, train="all")


def test_a_configuration_is_named(on_disk):
    root = on_disk.parquet()
    about = "---\nconfigs:\n"
    for name, split in {"many": "train", "few": "test"}.items():
        about += f"- config_name: {name}\n  data_files: data/{split}-*.parquet\n"
    (root / "README.md").write_text(about + "---\n")
    for name, rows in {"many": 30, "few": 12}.items():
        data = HuggingFace(path=str(root), name=name, val_fraction=0.5)
        data.setup("fit")
        assert len(data.train_set) + len(data.val_set) == rows
    with pytest.raises(ValueError, match="few"):
        HuggingFace(path=str(root))


def test_images_of_any_size(on_disk):
    data = HuggingFace(path=str(on_disk.parquet()), image_size=16)
    data.setup("fit")
    assert data.train_set[0][0].shape == data.val_set[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (lambda count: [[0, 1]] * count, "list", "must hold a class, an integer or a text"),
        (lambda count: [0.5] * count, "float64", "must hold a class, an integer or a text"),
        (lambda count: [i % 3 + 5 * (count == 10) for i in range(count)], "int64", "in 0..2, fou"),
        (lambda count: [-1 if count == 10 else 0] * count, "int64", r"found \[-1\]"),
        (
            lambda count: ["a" if count == 10 else "b"] * count,
            "string",
            "'validation' of .* has labels that the training images do not have: a",
        ),
    ],
)
def test_labels_that_do_not_fit(on_disk, labels, kind, message):
    root = on_disk.parquet(labels, kind)
    with pytest.raises(ValueError, match=message):
        HuggingFace(path=str(root)).setup("fit")


@pytest.mark.fault(
    "a broken image in a Hugging Face dataset",
    "The error names its row, or it is skipped and counted.",
)
def test_a_broken_image_is_named_by_its_row(on_disk):
    root = on_disk.parquet()
    path = root / "data/test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.column("img").to_pylist()
    rows[7]["bytes"] = b"broken"
    column = pyarrow.array(rows, type=table.schema.field("img").type)
    pyarrow.parquet.write_table(table.set_column(0, "img", column), path)
    data = HuggingFace(path=str(root))
    with pytest.raises(UnreadableImageError, match=rf"{root}, test, row 7 \(test_7.png\): "):
        data.setup("test")
    skipping = HuggingFace(path=str(root), on_error="skip", batch_size=12)
    skipping.setup("test")
    ((_, labels),) = skipping.test_dataloader()
    assert len(labels) == 11
    with pytest.warns(UserWarning, match="1 images could not be read"):
        skipping.teardown("test")


@pytest.mark.fault("a Hugging Face dataset that does not exist", "The error names it.")
def test_no_such_dataset(on_disk, tmp_path, monkeypatch):
    on_disk.parquet()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none is not a folder of files"):
        HuggingFace(path=f"{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/empty is not a folder of files"):
        HuggingFace(path=f"{tmp_path}/empty")


def test_without_download_the_path_must_be_a_folder(on_disk, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the Hub")

    root = on_disk.parquet()
    HuggingFace(path=str(root), download=False)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match=r"no folder /.*/uoft-cs/cifar10 .*0.parquet"):
        HuggingFace(path="uoft-cs/cifar10", download=False)


def test_image_files_in_class_folders(on_disk, tmp_path):
    """In the layout of the library's ImageFolder."""
    on_disk.parquet()
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "folder" / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(pixels(4, 24)):
                Image.fromarray(image).save(folder / f"{i}.png")
    data = HuggingFace(path=str(tmp_path / "folder"), val_fraction=0.5)
    data.setup("test")
    assert [int(label) for _, label in data.test_set] == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(data.test_set[5][0], pixels(4, 24)[1].transpose(2, 0, 1))

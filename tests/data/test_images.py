"""Images of unusual modes, sizes and orientations, and broken ones."""

import io
import os

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from teamnet_pl.data import ImageFolder, Statistics
from teamnet_pl.data.images import read_image
from teamnet_pl.data.loading import SkippedImages, UnreadableImageError
from tests.helpers.images import encoded
from tests.helpers.runs import error_of
from tests.helpers.teams import make_team, make_trainer

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


def read(content, channels=3, *args):
    """The pixels of an image file."""
    return np.asarray(read_image("name", io.BytesIO(content), channels, *args))


# Modes


def test_grey_becomes_color_and_color_grey():
    grey, color = Image.fromarray(GREY), Image.fromarray(COLOR)
    np.testing.assert_array_equal(read(encoded(grey)), np.stack([GREY] * 3, axis=2))
    np.testing.assert_array_equal(read(encoded(grey), 1), GREY)
    np.testing.assert_array_equal(read(encoded(color)), COLOR)
    luma = COLOR @ [0.299, 0.587, 0.114]  # ITU-R 601
    np.testing.assert_allclose(read(encoded(color), 1), luma, atol=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_upper_eight(channels):
    values = GREY.astype(np.uint16) * 256 + 255
    image = read(encoded(values), channels)
    np.testing.assert_array_equal(image.reshape(8, 8, -1)[..., 0], GREY)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bit_files_that_hold_fewer_bits(bits):
    values = GREY.astype(np.uint16) * 2 ** (bits - 8) + 2 ** (bits - 8) - 1
    np.testing.assert_array_equal(read(encoded(values), 1, bits), GREY)


def test_a_value_that_needs_more_bits_than_given():
    values = np.full((8, 8), 1024, dtype=np.uint16)
    assert read(encoded(values), 1, 11).shape == (8, 8)
    with pytest.raises(UnreadableImageError, match="value 1024, which takes more than 10 bits"):
        read(encoded(values), 1, 10)


def save_twelve_bits(root):
    """Writes folders of 12-bit images in 16-bit files."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                values = random.integers(2000 * label, 2000 * label + 2000, (8, 8), dtype=np.uint16)
                values[0, 0] = 4000
                Image.fromarray(values).save(folder / f"{index}.png")


@pytest.mark.fault(
    "16-bit files with 12-bit values", "They are detected in the training images, with a warning."
)
def test_bits_are_detected_with_a_warning(tmp_path):
    save_twelve_bits(tmp_path)
    with pytest.warns(UserWarning, match="values up to 4000, so 12 bits are taken"):
        data = ImageFolder(root=tmp_path, train_transform=[])
    data.setup("fit")
    assert data.bits == data.describe()["preprocessing"]["bits"] == 12
    images, _ = next(iter(data.val_dataloader()))
    assert images.unique().numel() > 100  # not 16 grey levels
    assert images[:, 0, 0, 0].tolist() == [4000 >> 4] * len(images)
    data = ImageFolder(root=tmp_path, train_transform=[], bits=16)
    data.setup("fit")
    images, _ = next(iter(data.val_dataloader()))
    assert images.max() <= 15


def test_cmyk_jpeg():
    """Red is the absence of cyan and black, also in JPEG."""
    cmyk = np.zeros((8, 8, 4), dtype=np.uint8)
    cmyk[..., 1:3] = 255
    image = Image.frombytes("CMYK", (8, 8), cmyk.tobytes())
    decoded = read(encoded(image, "JPEG", quality=100))
    np.testing.assert_allclose(decoded, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=4)


def test_palette_and_transparency():
    palette = Image.fromarray(COLOR).quantize(64)
    expected = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(read(encoded(palette)), expected)
    alpha = np.concatenate([COLOR, GREY[..., None]], axis=2)
    np.testing.assert_array_equal(read(encoded(alpha)), COLOR)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, COLOR),
        (2, COLOR[:, ::-1]),
        (3, COLOR[::-1, ::-1]),
        (4, COLOR[::-1]),
        (5, COLOR.transpose(1, 0, 2)),
        (6, np.rot90(COLOR, -1)),
        (7, COLOR[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(COLOR)),
    ],
)
def test_exif_orientation(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(encoded(COLOR, exif=exif)), turned)


def test_32_bits_are_refused():
    for values in (GREY.astype(np.float32), GREY.astype(np.int32)):
        with pytest.raises(UnreadableImageError, match="name: an image has 32 bits per pixel"):
            read(encoded(values, "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text"])
def test_damaged_images_are_named(form, damage):
    content = encoded(np.tile(COLOR, (20, 20, 1)), form)
    with pytest.raises(UnreadableImageError, match="name: "):
        read(damage(content))


# In a dataset


@pytest.fixture
def folder(on_disk):
    """A folder of 24 training, 6 validation and 9 test images."""
    return on_disk.image_folder(form="PNG", suffix="png", size=40)


def replace(root, content, split="train", which=range(3)):
    """Replaces some of the images, and returns their paths."""
    paths = sorted((root / split).rglob("*.png"))
    for index in which:
        paths[index].write_bytes(content)
    return [str(paths[index]) for index in which]


def image_folder(root, stage="fit", **kwargs):
    pl.seed_everything(0, verbose=False)
    data = ImageFolder(**{"root": root, "batch_size": 4} | kwargs)
    data.setup(stage)
    return data


@pytest.mark.fault(
    "a broken training image", "The error names the file, also if a worker reads it."
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])  # after an error, torch waits 5 s for each
def test_a_broken_image_is_named(folder, num_workers):
    data = image_folder(folder, num_workers=num_workers)
    # Broken after the check of some images, which precedes the training.
    (path,) = replace(folder, b"broken", which=[5])
    with pytest.raises(UnreadableImageError, match=f"^{path}: not an image in .*WEBP.$"):
        list(data.train_dataloader())


@pytest.mark.fault(
    "a broken image in any split", "The error names the file before training starts."
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_broken_image_is_named_before_training(folder, split):
    (path,) = replace(folder, b"broken", split, which=[5])
    with pytest.raises(UnreadableImageError, match=path):
        image_folder(folder, "test" if split == "test" else "fit")


@pytest.mark.fault(
    "broken images with `on_error: skip`", "They are left out, counted and listed in a warning."
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_counted_and_listed(folder, num_workers, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths = replace(folder, b"broken", which=(0, 1, 23)) + replace(folder, b"", "val", which=[2])
    data = image_folder(folder, on_error="skip", num_workers=num_workers)
    for _ in range(2):
        batches = list(data.train_dataloader())
        # In training, other images take their place, and no batch is smaller.
        assert [len(labels) for _, labels in batches] == [4] * 6
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 5
    with pytest.warns(UserWarning, match="ImageFolder: 4 images could not be read") as warned:
        data.teardown("fit")
    (message,) = (str(warning.message) for warning in warned)
    named = [line.partition(": ")[0] for line in message.splitlines()[1:]]
    assert named == sorted(paths)
    assert not list(tmp_path.glob("teamnet-skipped-*"))


def test_a_message_of_several_lines_is_recorded_once():
    skipped = SkippedImages()
    for _ in range(2):
        skipped.add(UnreadableImageError("a.png: first\nsecond"))
    assert skipped.pop() == ["a.png: first second"]


def test_there_is_no_warning_if_nothing_was_skipped(folder):
    data = image_folder(folder, on_error="skip")
    list(data.train_dataloader())
    data.teardown("fit")


def test_predict_never_skips_a_broken_image(folder):
    (path,) = replace(folder, b"broken", "test", which=[5])
    data = image_folder(folder, "predict", on_error="skip")
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 8
    with pytest.raises(UnreadableImageError, match=path):
        list(data.predict_dataloader())


@pytest.mark.fault("no readable image, with `on_error: skip`", "The error names one of the images.")
def test_a_dataset_of_broken_images(folder):
    replace(folder, b"broken", which=range(24))
    with pytest.raises(UnreadableImageError, match="png: cannot identify"):
        image_folder(folder, on_error="skip")


def test_metrics_leave_out_skipped_images(folder, tmp_path):
    """Even if it is a whole batch: the metrics are the same as without the files."""
    replace(folder, b"broken", "test", which=[0, 1, 2, 5])
    team = make_team(num_classes=3, input_shape=(3, 40, 40))
    options = {"batch_size": 3, "on_error": "skip"}
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="4 images could not be read"):
        (metrics,) = trainer.test(team, ImageFolder(root=folder, **options), verbose=False)
    for index, path in enumerate(sorted((folder / "test").rglob("*.png"))):
        if index in (0, 1, 2, 5):
            path.unlink()
    (expected,) = trainer.test(team, ImageFolder(root=folder, **options), verbose=False)
    assert metrics == pytest.approx(expected)


def test_channels_are_those_of_the_images(folder):
    assert image_folder(folder).input_shape == (3, 40, 40)
    grey = encoded(np.zeros((40, 40), np.uint8))
    replace(folder, grey, which=range(23))
    assert image_folder(folder).input_shape == (3, 40, 40)  # one image is in color
    replace(folder, grey, which=range(24))
    data = image_folder(folder)
    assert data.input_shape == (1, 40, 40)
    assert next(iter(data.val_dataloader()))[0].shape == (
        4,
        1,
        40,
        40,
    )  # of color images
    images = data.normalize(torch.full((1, 1, 2, 2), 0.449))
    torch.testing.assert_close(images, torch.zeros(1, 1, 2, 2), atol=1e-3, rtol=0)


def test_images_of_different_sizes(folder):
    other = encoded(np.zeros((30, 50, 3), np.uint8))
    replace(folder, other, which=[3])
    with pytest.raises(ValueError, match=r"differ in size \(30x50, 40x40, ...\): set image_size"):
        image_folder(folder)
    assert image_folder(folder, image_size=20).input_shape == (3, 20, 20)


@pytest.mark.fault("an image whose size differs from the others", "The error names it.")
def test_a_size_that_appears_late_is_named(folder):
    data = image_folder(folder)
    other = encoded(np.zeros((30, 50, 3), np.uint8))
    (path,) = replace(folder, other, "val", which=[3])
    with pytest.raises(UnreadableImageError, match=f"{path} has 30x50 pixels, the others 40x40"):
        list(data.val_dataloader())


def test_orientation_counts_for_the_size(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(np.zeros((30, 50, 3), np.uint8), exif=exif)
    for split, count in {"train": 24, "val": 6}.items():
        replace(folder, turned, split, which=range(count))
    data = image_folder(folder)
    assert data.input_shape == (3, 50, 30)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 50, 30)


def test_evaluation_crops_the_center(folder):
    side = np.zeros((64, 128, 3), np.uint8)
    side[:, 32:96] = 255
    replace(folder, encoded(side), "val", which=range(6))
    data = image_folder(folder, image_size=28)  # of the middle 56 of 64 pixels
    for image, _ in (data.val_set[i] for i in range(6)):
        assert image.shape == (3, 28, 28)
        assert image.min() > 250


def test_statistics_from_imagenet_the_data_or_the_user(folder):
    value = encoded(np.full((40, 40, 3), (51, 102, 153), np.uint8))
    replace(folder, value, which=range(12))
    value = encoded(np.full((40, 40, 3), (102, 102, 204), np.uint8))
    replace(folder, value, which=range(12, 24))
    data = image_folder(folder, statistics="data")
    np.testing.assert_allclose(data.mean, (0.3, 0.4, 0.7), atol=1e-6)
    np.testing.assert_allclose(data.std, (0.1, 0, 0.1), atol=1e-6)
    test = image_folder(folder, "test", statistics="data")
    assert (test.mean, test.std) == (data.mean, data.std)
    given = image_folder(folder, statistics=Statistics([0.1] * 3, [0.2] * 3))
    torch.testing.assert_close(
        given.normalize(torch.full((1, 3, 1, 1), 0.3)).mean(), torch.ones(())
    )
    with pytest.raises(
        ValueError, match=r"statistics\.std must have a value for each of 3 channels"
    ):
        image_folder(folder, statistics=Statistics([0.1] * 3, [0.2]))
    default = ImageFolder(root=folder)
    assert default.mean == (0.485, 0.456, 0.406)
    grey = encoded(np.zeros((40, 40), np.uint8))
    replace(folder, grey, which=range(24))
    assert np.allclose(ImageFolder(root=folder).std, 0.226)


def test_file_names_that_are_not_text(folder):
    name = os.fsencode(folder / "train/n01") + b"/\xff.png"
    os.rename(sorted((folder / "train/n01").iterdir())[0], name)
    assert len(image_folder(folder).train_set) == 24


# Folders


def test_folders_are_classes_and_splits(on_disk):
    root = on_disk.image_folder(form="PNG", suffix="png", classes=("cat", "dog", "emu"))
    data = image_folder(root, image_size=32)
    assert data.num_classes == 3
    assert (len(data.train_set), len(data.val_set)) == (24, 6)
    data.setup("test")
    assert [label for _, label in (data.test_set[i] for i in range(9))] == [0] * 3 + [1] * 3 + [
        2
    ] * 3
    dogs = sorted((root / "test/dog").iterdir())
    for i, path in enumerate(dogs):
        image, label = data.test_set.dataset[3 + i]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path)))
        assert label == 1
    cut = image_folder(root, image_size=32, val_fraction=0.25)
    assert (len(cut.train_set), len(cut.val_set)) == (18, 6)
    other = image_folder(root, "test", image_size=32, test="val")
    assert len(other.test_set) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), FileNotFoundError, "no folder {}/train"),
        (lambda root: (root / "train").rename(root / "training"), FileNotFoundError, "{}/train"),
        (lambda root: (root / "train/empty").mkdir(), FileNotFoundError, "{}/train.*classes empty"),
        (lambda root: (root / "val/other").mkdir(), ValueError, "{}/val has .* other"),
    ],
)
def test_folders_that_do_not_fit(folder, change, error, message):
    change(folder)
    with pytest.raises(error, match=message.format(folder)):
        image_folder(folder)


def test_a_split_without_images(folder):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="ImageFolder, validation split: there is no image in it"):
        image_folder(folder)


@pytest.mark.fault("a data folder without class folders", "The error names the folder.")
def test_no_class_folders(folder):
    for path in (folder / "train").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(FileNotFoundError, match=r"train should hold a folder .* for each class"):
        image_folder(folder)


def test_no_test_folder(folder):
    (folder / "test").rename(folder / "other")
    with pytest.raises(FileNotFoundError, match=f"no folder {folder}/test"):
        image_folder(folder, "test")


@pytest.mark.fault(
    "a missing data folder", "The command reports it in one sentence and exits with status 2."
)
def test_the_command_line_names_a_missing_folder(cli, capsys, tmp_path):
    words = ["--data", "ImageFolder", "--data.root", tmp_path / "none"]
    assert f"no folder {tmp_path}/none/train" in error_of(capsys, cli, tmp_path, "fit", *words)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("form", "num_workers"), [("PNG", 0), ("JPEG", 0), ("JPEG", 1)])
def test_the_command_line_names_a_broken_image(cli, capsys, on_disk, tmp_path, form, num_workers):
    """Before training or when it is read."""
    folder = on_disk.image_folder(form=form, suffix=form.lower(), size=40)
    path = sorted((folder / "train").rglob(f"*.{form.lower()}"))[5]
    path.write_bytes(path.read_bytes()[:-500])  # only its end is missing
    options = ["--data", "ImageFolder", "--data.root", folder, "--data.num_workers", num_workers]
    options += ["--trainer.limit_train_batches", 1.0]
    message = error_of(capsys, cli, tmp_path, "fit", *options)
    assert f"error: {path}: image file is truncated" in message
    assert "Union" not in message

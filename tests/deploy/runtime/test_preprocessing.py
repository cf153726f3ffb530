import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from teamnet_pl.data.images import FORMATS
from teamnet_pl.deploy.runtime.preprocessing import Preprocessing
from tests.helpers.images import encoded, hostile_files

MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)


@pytest.fixture
def photos():
    """Two images, shape (N, H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)


@pytest.fixture
def rgb():
    return Preprocessing((3, 4, 6), MEAN, STD)


def by_hand(images):
    return (images / 255 - np.array(MEAN)) / np.array(STD)


def test_every_way_to_pass_images(rgb, photos, tmp_path):
    pictures = [Image.fromarray(image) for image in photos]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    channels_first = torch.from_numpy(photos).permute(0, 3, 1, 2)
    ways = [
        photos,
        list(photos),
        photos / 255,
        (photos / 255).astype(np.float32),
        channels_first,
        list(channels_first),
        channels_first / 255,
        (channels_first.double() / 255),
        pictures,
        tuple(pictures),
        paths,
        [str(path) for path in paths],
        [photos[0], paths[1]],
    ]
    expected = torch.from_numpy(by_hand(photos)).permute(0, 3, 1, 2).float()
    for images in ways:
        batch = rgb(images)
        assert type(batch) is torch.Tensor
        torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)
    for single in (photos[0], channels_first[0], pictures[0], paths[0], str(paths[0])):
        torch.testing.assert_close(rgb(single), expected[:1], rtol=1e-5, atol=1e-5)


def test_pictures_get_the_channels_of_the_net(photos):
    grey = Preprocessing((1, 4, 6), [0], [1])
    picture = Image.fromarray(photos[0])
    expected = torch.from_numpy(np.asarray(picture.convert("L"))[None, None] / 255).float()
    for mode in ("RGB", "RGBA", "L"):
        torch.testing.assert_close(grey(picture.convert(mode)), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(grey(np.asarray(picture.convert("L"))), expected)
    rgb = Preprocessing((3, 4, 6), [0] * 3, [1] * 3)
    torch.testing.assert_close(rgb(picture.convert("L")), expected.expand(1, 3, 4, 6))


def test_transparent_palette(rgb, photos):
    picture = Image.fromarray(photos[0]).quantize(8)
    expected = rgb(picture.convert("RGB"))
    picture.info["transparency"] = bytes([0, 128])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(rgb(picture), expected)


def test_files_are_read_as_in_training(rgb, photos, tmp_path):
    """A photo of a camera held sideways, and a file with 16 bits per value."""
    exif = Image.Exif()
    exif[0x0112] = 8  # rotate by 90 degrees counterclockwise
    Image.fromarray(np.rot90(photos[0], -1)).save(tmp_path / "side.png", exif=exif)
    torch.testing.assert_close(rgb(tmp_path / "side.png"), rgb(photos[0]))
    grey = photos[0, ..., 0]
    Image.fromarray(grey.astype(np.uint16) * 256 + 9).save(tmp_path / "deep.png")
    torch.testing.assert_close(
        rgb(tmp_path / "deep.png"), rgb(np.repeat(grey[..., None], 3, axis=2))
    )


def test_transforms_precede_normalization(photos):
    resized = Preprocessing((3, 2, 2), MEAN, STD, [v2.CenterCrop(2)])
    cropped = torch.from_numpy(by_hand(photos)[:, 1:3, 2:4]).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(resized(photos), cropped)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        (torch.zeros(0, 3, 4, 6), "at least one image"),
        (torch.zeros(4, 6), "3 or 4 axes"),
        (np.zeros(4), "2 to 4 axes"),
        (torch.zeros(1, 4, 6), r"shape \(1, 4, 6\).*trained on \(3, 4, 6\)"),
        (torch.zeros(3, 6, 4), r"shape \(3, 6, 4\)"),
        (np.zeros((4, 6)), r"shape \(1, 4, 6\)"),
        (torch.full((3, 4, 6), 255.0), r"in \[0, 1\], found 255"),
        (torch.full((3, 4, 6), -1.0), r"in \[0, 1\], found -1"),
        (torch.full((3, 4, 6), torch.nan), r"in \[0, 1\], found nan"),
        (torch.zeros(3, 4, 6, dtype=torch.int64), r"uint8, found torch.int64"),
        (Image.new("I", (6, 4)), "32 bits per pixel"),
        (Image.new("F", (6, 4)), "32 bits per pixel"),
        (Image.new("RGB", (4, 6)), r"shape \(3, 6, 4\)"),
        ([3], "found a int"),
        (None, "found a NoneType"),
    ],
)
def test_input_that_is_not_an_image(rgb, images, message):
    with pytest.raises(ValueError, match=message):
        rgb(images)


def test_no_file(rgb, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        rgb(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0, 0], [1, 1, 1], "a value for each of 3 channels"),
        ([0] * 3, [1], "a value for each of 3 channels"),
        ([0, float("nan"), 0], [1] * 3, "a value for each of 3 channels"),
        ([0] * 3, [1, 0, 1], "std must be positive"),
    ],
)
def test_normalization_that_does_not_fit(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing((3, 4, 6), mean, std)


def test_pictures_have_one_or_three_channels():
    with pytest.raises(ValueError, match="takes 2 channels"):
        Preprocessing((2, 4, 6), [0] * 2, [1] * 2)(Image.new("RGB", (6, 4)))


# Files that are not trusted


def preprocessing(size, **kwargs):
    """For grey images of a size (height, width)."""
    return Preprocessing((1, *size), [0.0], [1.0], **kwargs)


@pytest.mark.parametrize("format", FORMATS)
def test_supported_formats(format, photos):
    picture = Image.fromarray(photos[0])
    batch = preprocessing((4, 6))(encoded(picture, format))
    assert batch.shape == (1, 1, 4, 6)
    if format not in ("GIF", "JPEG", "JPEG2000", "WEBP"):  # the lossy ones
        expected = torch.from_numpy(np.array(picture.convert("L"))) / 255
        torch.testing.assert_close(batch[0, 0], expected)


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO"])
def test_unsupported_formats_are_refused(format, photos):
    with pytest.raises(ValueError, match="The image: not an image in one of the formats BMP"):
        preprocessing((4, 6))(encoded(Image.fromarray(photos[0]), format))


@pytest.mark.fault("prediction for a damaged or hostile image file", "The error names it.")
@pytest.mark.parametrize("name", hostile_files())
def test_hostile_files(name, tmp_path):
    read = preprocessing((8, 8))
    with pytest.raises(ValueError, match=r"^The image: "):
        read(hostile_files()[name])
    path = tmp_path / "file"
    path.write_bytes(hostile_files()[name])
    with pytest.raises(ValueError, match=r"/file: "):
        read(path)


def test_large_files_are_refused_before_decoding():
    read = preprocessing((8, 8))
    with pytest.raises(ValueError, match="4097x4097 pixels, 16,777,216 are allowed"):
        read(hostile_files()["large"])
    with pytest.raises(ValueError, match="8x8 pixels, 63 are allowed"):
        read(encoded(Image.new("L", (8, 8))), max_pixels=63)
    assert read(encoded(Image.new("L", (8, 8))), max_pixels=64).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_files_of_16_bits_that_hold_fewer(bits, tmp_path):
    """A file, its content and a PIL image give the same values as an 8-bit image."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
    path = tmp_path / "deep.png"
    Image.fromarray(values << (bits - 8)).save(path)
    preprocessing = Preprocessing((1, 8, 8), [0.5], [0.5], bits=bits)
    expected = preprocessing(values.astype(np.uint8))
    with Image.open(path) as image:
        for given in (path, path.read_bytes(), image):
            assert torch.equal(preprocessing(given), expected)
    with pytest.raises(ValueError, match="8x8 pixels, 63 are allowed"):
        preprocessing(path, max_pixels=63)

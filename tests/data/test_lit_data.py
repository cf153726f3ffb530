import io
import itertools
import os
import pickle

import lightning.pytorch as pl
import litdata
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from teamnet_pl.data import LitData, Statistics
from teamnet_pl.data.lit_data import ChunkSampler
from teamnet_pl.data.loading import UnreadableImageError
from tests.helpers.datasets import (
    flat,
    numbered_image,
    numbers_in,
    png_and_label,
    record_fit,
    same_tensors,
)
from tests.helpers.images import encoded, pixels

# litdata ignores this warning too, because it copies the tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")

COUNTS = {"train": 40, "val": 7, "test": 6}


def lit_data(on_disk, stage="fit", **kwargs):
    """Images without transforms, in batches of 4."""
    pl.seed_everything(0, verbose=False)
    for split, count in COUNTS.items():
        if split not in kwargs and not (on_disk.folder / split).exists():
            on_disk.litdata(range(count), split)
    folders = {split: str(on_disk.folder / split) for split in COUNTS}
    options = {"num_classes": 3, "batch_size": 4, "train_transform": []}
    data = LitData(**folders | options | kwargs)
    data.setup(stage)
    return data


def test_images_and_labels_of_each_split(on_disk):
    data = lit_data(on_disk)
    assert data.input_shape == (3, 24, 24)
    train = numbers_in(data.train_dataloader())
    assert sorted(train) == list(range(40))
    assert train != sorted(train)
    assert numbers_in(data.val_dataloader()) == list(range(7))
    data.setup("test")
    assert numbers_in(data.test_dataloader()) == list(range(6))
    assert numbers_in(data.predict_dataloader()) == list(range(6))


SAMPLES = {
    "pair": lambda i: (encoded(numbered_image(i), "PNG"), i % 3),
    "list": lambda i: [encoded(numbered_image(i), "PNG"), i % 3],
    "bmp": lambda i: {"image": encoded(numbered_image(i), "BMP"), "label": i % 3},
    "pillow": lambda i: {"image": Image.fromarray(numbered_image(i)), "label": i % 3},
    "array": lambda i: {"image": numbered_image(i), "label": i % 3},
    "numpy label": lambda i: {"image": numbered_image(i), "label": np.int64(i % 3)},
    "tensor": lambda i: (torch.tensor(numbered_image(i)).permute(2, 0, 1), torch.tensor(i % 3)),
    "image": lambda i: {
        "image": litdata.Image(bytes=encoded(numbered_image(i), "PNG")), "label": i % 3
    },
    "more": lambda i: {
        "id": str(i), "image": numbered_image(i), "label": i % 3, "box": [0.5, 1.0]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_form_of_sample(on_disk, kind):
    on_disk.litdata(range(40), sample=SAMPLES[kind])
    data = lit_data(on_disk)
    assert sorted(numbers_in(data.train_dataloader())) == list(range(40))


@pytest.mark.parametrize("kind", ["bytes", "jpeg"])
def test_jpeg_files_are_decoded_as_by_pillow(on_disk, kind):
    files = [encoded(numbered_image(i), "JPEG") for i in range(7)]
    make = litdata.Jpeg if kind == "jpeg" else dict
    samples = [make(bytes=file) if kind == "jpeg" else file for file in files]
    on_disk.litdata(samples, "val", sample=lambda sample: (sample, 0))
    images = torch.cat([images for images, _ in lit_data(on_disk).val_dataloader()])
    truth = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), truth)


@pytest.mark.parametrize(
    "make",
    [
        lambda grey: grey,
        lambda grey: grey[..., None],
        lambda grey: torch.tensor(grey)[None],
        Image.fromarray,
        lambda grey: np.stack([grey] * 3, axis=2),
        lambda grey: np.stack([grey] * 4, axis=2),
    ],
)
def test_grey_images(on_disk, make):
    grey = [pixels(1, 24, 1, seed=i)[0] for i in range(7)]
    for split in COUNTS:
        on_disk.litdata(grey, split, sample=lambda image: (make(image), 1))
    data = lit_data(on_disk, channels=1)
    assert data.input_shape == (1, 24, 24)
    images = torch.cat([images for images, _ in data.val_dataloader()])
    np.testing.assert_array_equal(images[:, 0], np.stack(grey))
    color = torch.cat([images for images, _ in lit_data(on_disk).val_dataloader()])
    np.testing.assert_array_equal(color, np.stack([grey] * 3, axis=1))


def test_keys_are_named(on_disk):
    for split, count in COUNTS.items():
        on_disk.litdata(
            range(count),
            split,
            sample=lambda number: {"class": number % 3, "jpg": numbered_image(number)},
        )
    data = lit_data(on_disk, image_key="jpg", label_key="class")
    assert numbers_in(data.val_dataloader()) == list(range(7))
    with pytest.raises(ValueError, match=r"train, sample 0 .* 'image' .* a dict of 'class', 'jpg'"):
        lit_data(on_disk)


def test_an_epoch_takes_chunk_after_chunk(on_disk):
    data = lit_data(on_disk)
    loader = data.train_dataloader()
    first, second = numbers_in(loader), numbers_in(loader)
    for order in (first, second):
        assert sorted(order) == list(range(40))
        chunks = [number // 9 for number in order]
        visits = [chunk for chunk, _ in itertools.groupby(chunks)]
        assert sorted(visits) == list(range(5))
        assert visits != sorted(visits)
        within = [[number for number in order if number // 9 == chunk] for chunk in range(4)]
        assert all(numbers != sorted(numbers) for numbers in within)
    assert first != second
    assert numbers_in(lit_data(on_disk).train_dataloader()) == first


def test_blocks_are_shuffled_and_so_are_their_images():
    sampler = ChunkSampler(range(1400), [700, 400, 300], 0, 1, 0)
    order = [drawn.index for drawn in sampler]
    assert sorted(order) == list(range(1400))
    chunk = np.split(np.arange(700), [256, 512])
    first_chunk = [image for image in order if image < 700]
    blocks = [next(i for i, block in enumerate(chunk) if image in block) for image in first_chunk]
    visits = [block for block, _ in itertools.groupby(blocks)]
    assert sorted(visits) == [0, 1, 2]
    orders = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        images = [drawn.index for drawn in sampler if drawn.index < 700]
        orders.add(tuple(dict.fromkeys(image // 256 for image in images)))
        assert images[:100] != sorted(images[:100])
    assert len(orders) == 6


@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=4),
    processes=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 3),
)
def test_processes_take_turns_in_the_order_of_one(sizes, processes, seed, epoch):
    def draws(number, rank):
        sampler = ChunkSampler(range(sum(sizes)), sizes, seed, number, rank)
        sampler.set_epoch(epoch)
        return list(sampler)

    whole = draws(1, 0)
    shares = [draws(processes, rank) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    turns = [drawn for turn in zip(*shares, strict=True) for drawn in turn]
    assert turns[: len(whole)] == whole
    assert len(turns) < len(whole) + processes
    assert sorted(drawn.index for drawn in whole) == list(range(sum(sizes)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_any_number_of_workers_gives_the_same_batches(on_disk):
    def epochs(num_workers):
        data = lit_data(
            on_disk, num_workers=num_workers, train_transform=v2.ColorJitter(0.5), mixup_alpha=1
        )
        loader = data.train_dataloader()
        batches = flat(batch for _ in range(2) for batch in loader)
        return batches, numbers_in(data.val_dataloader())

    expected, val = epochs(0)
    assert len(expected) == 2 * 2 * 10
    assert val == list(range(7))
    for num_workers in (1, 2):
        batches, val = epochs(num_workers)
        assert same_tensors(batches, expected)
        assert val == list(range(7))


def test_loaders_pickle_for_spawned_workers(on_disk):
    data = lit_data(on_disk)
    expected = list(data.val_dataloader())
    copied = pickle.loads(pickle.dumps(data.val_dataloader()))
    assert same_tensors(flat(copied), flat(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [(0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize(("every", "on_error"), [(14, "raise"), (3, "skip"), (10, "raise")])
def test_a_resumed_run_continues_with_the_same_batches(on_disk, tmp_path, workers, every, on_error):
    def run(num_workers, ckpt_path=None):
        data = lit_data(
            on_disk,
            num_workers=num_workers,
            mixup_alpha=1,
            train_transform=v2.ColorJitter(0.5),
            on_error=on_error,
        )
        return flat(record_fit(tmp_path, data, every, ckpt_path).seen)

    if on_error == "skip":
        on_disk.litdata(range(40), sample=lambda i: broken() if i % 9 == 5 else png_and_label(i))
    whole = run(workers[0])
    assert len(whole) == 2 * 20
    resumed = run(workers[1], tmp_path / f"step={every}.ckpt")
    assert same_tensors(resumed, whole[2 * every :])


def broken(label=0):
    return {"image": b"none", "label": label}


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_the_order_of_one(on_disk, monkeypatch):
    order = numbers_in(lit_data(on_disk).train_dataloader())
    # litdata must not divide the images among the processes a second time.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setattr(LitData, "_processes", lambda self, rank=rank: (2, rank))
        loader = lit_data(on_disk, batch_size=3).train_dataloader()
        assert len(loader) == 6
        assert numbers_in(loader) == order[rank::2][:18]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_evenly_without_loss(on_disk, tmp_path):
    on_disk.litdata(range(39))
    data = lit_data(on_disk, batch_size=20)
    record_fit(tmp_path, data, strategy="ddp_fork", devices=2, num_sanity_val_steps=0)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for seen, _ in shares:
        assert [len(labels) for _, labels in seen] == [20] * 2  # two epochs of a batch
    evaluated = [[len(labels) for _, labels in val] for _, val in shares]
    assert evaluated == [[4] * 2, [3] * 2]
    for epoch in range(2):
        batches = [seen[epoch][0] for seen, _ in shares]
        assert len({image.numpy().tobytes() for image in torch.cat(batches)}) == 39
        batches = [val[epoch][0] for _, val in shares]
        assert len({image.numpy().tobytes() for image in torch.cat(batches)}) == 7


@pytest.mark.fault(
    "a broken image in a LitData folder", "The error names it, or it is skipped and counted."
)
def test_broken_images(on_disk):
    on_disk.litdata(
        [png_and_label(i) if i != 17 else broken() for i in range(40)],
        sample=lambda sample: sample | {"image": litdata.Image(bytes=sample["image"])},
    )
    for split in ("val", "test"):
        on_disk.litdata(range(6), split, sample=lambda i: png_and_label(i) if i != 3 else broken())
    data = lit_data(on_disk)
    with pytest.raises(UnreadableImageError, match=r"val, sample 3: not an image in"):
        list(data.val_dataloader())
    with pytest.raises(UnreadableImageError, match=r"train, sample 17: not an image in"):
        list(data.train_dataloader())
    data = lit_data(on_disk, on_error="skip")
    train = numbers_in(data.train_dataloader())
    assert sorted(train) == sorted([*range(17), 18, *range(18, 40)])  # the next one instead
    assert numbers_in(data.val_dataloader()) == [0, 1, 2, 4, 5]
    with pytest.warns(UserWarning, match="2 images could not be read") as warned:
        data.teardown("fit")
    assert "val, sample 3: not an image in" in str(warned[0].message)
    data.setup("predict")
    assert numbers_in(data.test_dataloader()) == [0, 1, 2, 4, 5]
    with pytest.raises(UnreadableImageError, match="test, sample 3"):
        list(data.predict_dataloader())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (7, r"val, sample 0 must be a pair .* found a int"),
        ((b"", 1, 2), r"found a tuple"),
        ({"image": b"", "class": 1}, r"found a dict of 'image', 'class'"),
        ((b"none", 1), r"val, sample 0: not an image in"),
        ((b"", 3), r"val, sample 0 must have a label in 0..2, found 3 \(int\)"),
        ((b"", -1), r"found -1 \(int\)"),
        ((b"", 1.0), r"found 1.0 \(float\)"),
        ((b"", "ant"), r"found 'ant' \(str\)"),
        ((b"", torch.tensor([1, 0])), r"found tensor\(\[1, 0\]\) \(Tensor\)"),
        (("a.png", 1), r"val, sample 0 must have an image: .* found str"),
        ((np.zeros((4, 4, 3)), 1), r"found ndarray of float64 and shape \(4, 4, 3\)"),
        ((np.zeros((3, 5, 5), np.uint8), 1), r"found ndarray of uint8 and shape \(3, 5, 5\)"),
        ((torch.zeros(3, 4, 4), 1), r"found Tensor of torch.float32 and shape \(3, 4, 4\)"),
        ((Image.new("P", (4, 4)), 1), r"found Image of mode P"),
        ((Image.new("F", (4, 4)), 1), r"found Image of mode F"),
    ],
)
def test_samples_that_do_not_fit_are_named_before_training(on_disk, sample, message):
    on_disk.litdata([sample], "val", sample=lambda sample: sample)
    with pytest.raises(ValueError, match=message):
        lit_data(on_disk)


def test_a_late_label_is_named(on_disk):
    on_disk.litdata(range(7), "val", sample=lambda i: png_and_label(i) | {"label": i})
    data = lit_data(on_disk, on_error="skip")
    with pytest.raises(ValueError, match=r"val, sample 3 must have a label in 0..2, found 3"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("stage", "arguments", "error", "message"),
    [
        ("fit", {"train": "/none"}, FileNotFoundError, "no /none/index.json: /none must be a fold"),
        ("fit", {"val": "/none"}, FileNotFoundError, "no /none/index.json: /none must be a folder"),
        (
            "fit",
            {"train": "https://a"},
            ValueError,
            r"cannot read https://a: it must be a folder, or .* s3://",
        ),
        ("test", {"test": None}, ValueError, "no test images: set test"),
        ("fit", {"train_transform": v2.Pad(1)}, ValueError, r"train_transform .* \(3, 26, 26\)"),
        ("fit", {"image_size": 0}, ValueError, "image_size must be at least 1, found 0"),
    ],
)
def test_arguments_that_do_not_fit(on_disk, stage, arguments, error, message):
    with pytest.raises(error, match=message):
        lit_data(on_disk, stage, **arguments)


def test_sizes_that_differ(on_disk):
    sizes = [24, 24, 20]
    on_disk.litdata(sizes, "val", sample=lambda size: (pixels(1, size)[0], 0))
    with pytest.raises(UnreadableImageError, match="sample 2 has 20x20 pixels, the others 24x24"):
        list(lit_data(on_disk).val_dataloader())
    data = lit_data(on_disk, image_size=16, train_transform=None)
    assert data.input_shape == (3, 16, 16)
    ((images, _),) = data.val_dataloader()
    assert images.shape == (3, 3, 16, 16)


@pytest.mark.fault("a damaged chunk or index of a LitData folder", "The error names the file.")
def test_damaged_files_are_named(on_disk):
    lit_data(on_disk)
    chunk = next((on_disk.folder / "val").glob("*.bin"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"litdata cannot read .*val, sample 0: .*chunk-0-0"):
        lit_data(on_disk)
    (on_disk.folder / "val/index.json").write_text("{")
    with pytest.raises(ValueError, match=r"litdata cannot read .*val: "):
        lit_data(on_disk)


def test_statistics_of_the_data(on_disk):
    data = lit_data(on_disk, statistics="data")
    truth = np.stack([numbered_image(i) for i in range(40)]) / 255
    np.testing.assert_allclose(data.mean, truth.mean((0, 1, 2)))
    np.testing.assert_allclose(data.std, truth.std((0, 1, 2)))


def test_statistics_fit_the_channels_before_anything_is_read():
    options = {"num_classes": 3, "train": "s3://none", "val": "s3://none", "image_size": 24}
    assert len(LitData(channels=1, **options).mean) == 1
    with pytest.raises(ValueError, match=r"statistics.mean .* each of 1 channels, found 3"):
        LitData(channels=1, statistics=Statistics([0.5] * 3, [0.5] * 3), **options)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_read_in_place(on_disk, tmp_path):
    lit_data(on_disk)
    before = contents(on_disk.folder)
    data = lit_data(on_disk, cache_dir=str(tmp_path / "cache"))
    assert len(list(data.train_dataloader())) == 10
    assert contents(on_disk.folder) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("level", ["chunk", "batch", "sample"])
def test_compressed_chunks_stay_unchanged(on_disk, tmp_path, level):
    """litdata would replace them by decompressed ones."""
    pytest.importorskip("zstd")
    on_disk.litdata(
        range(40),
        sample=SAMPLES["array"],
        compression="zstd",
        compression_level=level,
    )
    before = contents(on_disk.folder / "train")
    data = lit_data(on_disk, cache_dir=str(tmp_path / "cache"))
    assert sorted(numbers_in(data.train_dataloader())) == list(range(40))
    assert contents(on_disk.folder / "train") == before
    assert len(list(tmp_path.glob("cache/**/*.bin"))) == (5 if level == "chunk" else 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_output_of_litdata_optimize(on_disk):
    litdata.optimize(
        png_and_label,
        list(range(40)),
        str(on_disk.folder / "train"),
        chunk_bytes="16KB",
        num_workers=2,
        start_method="fork",
        verbose=False,
    )
    data = lit_data(on_disk)
    assert len(data.train_set.dataset.chunk_sizes) > 2
    assert sorted(numbers_in(data.train_dataloader())) == list(range(40))


@pytest.fixture
def store(on_disk, file_server, tmp_path, monkeypatch):
    """The address of an object store with the folders."""
    bucket = tmp_path / "stored/bucket"
    for split, count in COUNTS.items():
        on_disk.litdata(range(count), split, chunk_size=20)
    bucket.parent.mkdir()
    on_disk.folder.rename(bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", file_server.start(bucket.parent))
    monkeypatch.setitem(litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS, "allow_http", "true")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "any")
    return "s3://bucket"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_chunks_come_from_an_object_store_once(on_disk, file_server, store, tmp_path, num_workers):
    folders = {split: f"{store}/{split}" for split in COUNTS}
    cache = tmp_path / "cache"
    data = lit_data(on_disk, num_workers=num_workers, cache_dir=str(cache), **folders)
    loader = data.train_dataloader()
    for _ in range(2):
        assert sorted(numbers_in(loader)) == list(range(40))
    assert numbers_in(data.val_dataloader()) == list(range(7))
    whole = [line for line in file_server.requests if line.startswith("GET") and ".bin" in line]
    assert len(whole) == len(set(whole)) == len(list(cache.rglob("*.bin"))) == 3


@pytest.mark.fault("data missing from an object store", "The error names the folder.")
def test_a_folder_that_the_store_lacks_is_named(on_disk, store, tmp_path):
    with pytest.raises(ValueError, match=r"litdata cannot read s3://bucket/none: .*404"):
        lit_data(on_disk, train=f"{store}/none", cache_dir=str(tmp_path))


def test_a_missing_client_is_named(on_disk, monkeypatch):
    monkeypatch.setattr(litdata.streaming.downloader, "_GOOGLE_STORAGE_AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError):
        lit_data(on_disk, train="gs://bucket/train", cache_dir=str(on_disk.folder))

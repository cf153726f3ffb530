import gzip
import tarfile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from teamnet_pl.data import Shards
from teamnet_pl.data.loading import LoadingError, UnreadableImageError
from teamnet_pl.data.shards import read_samples
from tests.helpers.datasets import flat, numbers_in, record_fit, same_tensors, write_tar
from tests.helpers.images import encoded

SIZES = [11, 7, 9, 13]  # 40 images


def shards(on_disk, stage="fit", **kwargs):
    """Images without transforms, in batches of 4."""
    pl.seed_everything(0, verbose=False)
    options = {
        "train": on_disk.shards(SIZES),
        "val": on_disk.shards([5, 2], "val"),
        "test": on_disk.shards([6], "test"),
        "num_classes": 3,
        "train_images": 40,
        "image_size": 24,
        "batch_size": 4,
        "train_transform": [],
    }
    data = Shards(**options | kwargs)
    data.eval_transform = list
    data.setup(stage)
    return data


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_and_labels_of_each_split(on_disk, num_workers):
    data = shards(on_disk, num_workers=num_workers)
    train = numbers_in(data.train_dataloader())
    assert len(data.train_dataloader()) == 10
    assert len(train) == 40
    if num_workers == 0:
        assert sorted(train) == list(range(40))
    assert train != sorted(train)
    assert sorted(numbers_in(data.val_dataloader())) == list(range(7))
    data.setup("test")
    assert sorted(numbers_in(data.test_dataloader())) == list(range(6))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_epoch_has_another_order_that_the_seed_repeats(on_disk, num_workers):
    def epochs():
        data = shards(on_disk, num_workers=num_workers, train_transform=v2.ColorJitter(0.5))
        loader = data.train_dataloader()
        return [torch.cat([images for images, _ in loader]) for _ in range(3)]

    first, again = epochs(), epochs()
    assert same_tensors(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_a_buffer_of_one_does_not_shuffle_within_a_shard(on_disk):
    data = shards(on_disk, buffer=1)
    order = numbers_in(data.train_dataloader())
    starts = np.cumsum([0, *SIZES[:-1]])
    parts = sorted(order.index(start) for start in starts)
    pieces = [order[a:b] for a, b in zip(parts, [*parts[1:], None], strict=True)]
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)


def test_an_epoch_longer_than_the_shards_repeats_them(on_disk):
    data = shards(on_disk, train_images=80)
    order = numbers_in(data.train_dataloader())
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
    assert order[:40] != order[40:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_workers", "every", "on_error"),
    [
        (0, 14, "raise"),
        (3, 1, "raise"),
        (3, 14, "raise"),  # within the second epoch of 10
        (2, 10, "raise"),
        (0, 3, "skip"),
        (3, 14, "skip"),
    ],
)
def test_a_resumed_run_continues_with_the_same_batches(
    on_disk, tmp_path, num_workers, every, on_error
):
    def run(ckpt_path=None):
        data = shards(
            on_disk,
            num_workers=num_workers,
            mixup_alpha=1,
            train_transform=v2.ColorJitter(0.5),
            on_error=on_error,
        )
        if on_error == "skip":
            path = on_disk.folder / "train-1.tar"
            path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"none", 2))
        return flat(record_fit(tmp_path, data, every, ckpt_path).seen)

    whole = run()
    assert len(whole) == 2 * 20
    resumed = run(ckpt_path=tmp_path / f"step={every}.ckpt")
    assert len(resumed) == 2 * (20 - every)
    assert same_tensors(resumed, whole[2 * every :])


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_shards(on_disk, rank, monkeypatch):
    monkeypatch.setattr(Shards, "_processes", lambda self: (2, rank))
    data = shards(on_disk, train_images=16)
    assert len(data.train_dataloader()) == 2
    numbers = numbers_in(data.train_dataloader())
    val = sorted(numbers_in(data.val_dataloader()))
    monkeypatch.setattr(Shards, "_processes", lambda self: (2, 1 - rank))
    others = numbers_in(shards(on_disk, train_images=16).train_dataloader())
    assert len(numbers) == len(others) == 8
    assert not set(numbers) & set(others)
    assert val == ([0, 2, 4, 6], [1, 3, 5])[rank]  # each once


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_evaluate_as_many_batches(on_disk, num_workers, monkeypatch):
    """Even if an image is skipped."""
    numbers, batches = set(), set()
    for rank in range(3):
        monkeypatch.setattr(Shards, "_processes", lambda self, rank=rank: (3, rank))
        data = shards(on_disk, batch_size=1, num_workers=num_workers, on_error="skip")
        path = on_disk.folder / "val-0.tar"
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"none", 1))
        val = list(data.val_dataloader())
        batches.add(len(val))
        numbers |= set(numbers_in(val))
    assert batches == {3}
    assert numbers == {1, 2, 3, 4, 5, 6}


@pytest.mark.fault(
    "a broken image in a tar shard",
    "The error names the shard and the key, or the image is skipped and counted.",
)
def test_broken_images(on_disk):
    data = shards(on_disk)
    path = on_disk.folder / "val-1.tar"
    broken = path.read_bytes().replace(b"\x89PNG", b"none", 1)
    path.write_bytes(broken)
    with pytest.raises(UnreadableImageError, match=r"val-1.tar, 0005.png: "):
        list(data.val_dataloader())
    data = shards(on_disk, on_error="skip")
    path.write_bytes(broken)
    train = on_disk.folder / "train-2.tar"
    train.write_bytes(train.read_bytes().replace(b"\x89PNG", b"none", 1))
    assert len(numbers_in(data.train_dataloader())) == 40  # the stream goes on
    assert sorted(numbers_in(data.val_dataloader())) == [0, 1, 2, 3, 4, 6]
    with pytest.warns(UserWarning, match="2 images could not be read") as warned:
        data.teardown("fit")
    assert "val-1.tar, 0005.png: " in str(warned[0].message)


@pytest.mark.fault(
    "samples of a tar shard without an image or a label",
    "The error names them before training starts.",
)
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "a.txt": b"1"}, r"val-0.tar, a must have .* found png, txt with class ''"),
        ({"a.cls": b"1"}, r"val-0.tar, a must have an image .* found cls with class '1'"),
        ({"a.png": b"", "a.cls": b"3"}, r"in 0..2, found png, cls with class '3'"),
        ({"a.png": b"", "a.cls": b"-1"}, r"in 0..2, found png, cls with class '-1'"),
        ({"a.png": b"", "a.cls": b"\xff"}, r"in 0..2, found png, cls with class"),
        ({"a.png": b"none", "a.cls": b"1"}, r"val-0.tar, a.png: not an image in"),
        ({}, r"There is no image in .*val-0.tar"),
    ],
)
def test_samples_that_do_not_fit_are_named_before_training(on_disk, members, message):
    val = f"{on_disk.folder}/other/val-0.tar"
    write_tar(on_disk.folder / "other/val-0.tar", members)
    with pytest.raises(ValueError, match=message):
        shards(on_disk, val=val)


@pytest.mark.fault("a truncated tar shard", "The error names the shard.")
def test_a_truncated_tar_is_named(on_disk):
    data = shards(on_disk)
    path = on_disk.folder / "val-1.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"val-1.tar cannot be read as a tar"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("stage", "arguments", "error", "message"),
    [
        ("fit", {"train": "/none-{0..2}.tar"}, FileNotFoundError, "train shards /none-0.tar, /no"),
        ("test", {"test": None}, ValueError, "no test shards: set test"),
        ("fit", {"buffer": 0}, ValueError, "buffer must be at least 1, found 0"),
        ("fit", {"train_transform": v2.Pad(1)}, ValueError, r"train images .* \(3, 26, 26\)"),
    ],
)
def test_arguments_that_do_not_fit(on_disk, stage, arguments, error, message):
    with pytest.raises(error, match=message):
        shards(on_disk, stage, **arguments)


def test_too_few_images_or_shards(on_disk):
    with pytest.raises(ValueError, match="1 x 4, found 3"):
        shards(on_disk, train_images=3).train_dataloader()
    with pytest.raises(ValueError, match="4 training shards, but 5 workers"):
        shards(on_disk, num_workers=5).train_dataloader()
    with pytest.raises(ValueError, match="cannot be used for prediction"):
        shards(on_disk, "predict").predict_dataloader()


def test_shards_over_http(on_disk, file_server):
    on_disk.shards(SIZES)
    address = file_server.start(on_disk.folder)
    data = shards(on_disk, train=f"{address}/train-{{0..3}}.tar")
    assert sorted(numbers_in(data.train_dataloader())) == list(range(40))


@pytest.mark.fault("a tar shard truncated between two files", "The error names the shard.")
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_shard_without_its_end_mark(on_disk, tmp_path, ending):
    """A cut between two files would otherwise make a valid but shorter archive."""
    on_disk.shards([5, 2], "val")
    whole = (on_disk.folder / "val-0.tar").read_bytes()
    with tarfile.open(on_disk.folder / "val-0.tar") as archive:
        cuts = [member.offset for member in archive][2:]
    pack = gzip.compress if ending == "tar.gz" else bytes
    path = tmp_path / f"shard.{ending}"
    path.write_bytes(pack(whole))
    count = len(list(read_samples(str(path))))
    assert count > 1
    for cut in cuts:
        path.write_bytes(pack(whole[:cut]))
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) > 0
        with pytest.raises(
            ValueError, match=rf"shard\.{ending} cannot be read.*ends without an end mark"
        ):
            list(read_samples(str(path)))


def test_a_shard_cut_within_its_compressed_bytes(on_disk, tmp_path):
    on_disk.shards([5, 2], "val")
    content = gzip.compress((on_disk.folder / "val-0.tar").read_bytes())
    path = tmp_path / "shard.tar.gz"
    for share in (0.3, 0.7, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"shard\.tar\.gz cannot be read"):
            list(read_samples(str(path)))


def test_bits_are_detected_in_one_reading_of_the_first_images(on_disk, monkeypatch):
    members = {}
    for number in range(20):
        values = np.full((24, 24), 4000 - number, dtype=np.uint16)
        members |= {f"{number}.png": encoded(values, "PNG"), f"{number}.cls": b"1"}
    write_tar(on_disk.folder / "deep-0.tar", members)
    reads = []

    def read(shard):
        reads.append(shard)
        return read_samples(shard)

    monkeypatch.setattr("teamnet_pl.data.shards.read_samples", read)
    with pytest.warns(UserWarning, match="values up to 4000, so 12 bits are taken"):
        data = shards(on_disk, train=f"{on_disk.folder}/deep-0.tar")
    assert data.bits == 12
    assert reads == [f"{on_disk.folder}/deep-0.tar", f"{on_disk.folder}/val-0.tar"]


@pytest.mark.fault(
    "a tar shard truncated while workers read it",
    "The error names the shard, without a worker's traceback.",
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_of_a_worker_has_no_traceback(on_disk, num_workers):
    data = shards(on_disk, num_workers=num_workers)
    path = on_disk.folder / "val-0.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(LoadingError, match=f"^{path} cannot be read as a tar of images: [^\n]*$"):
        list(data.val_dataloader())

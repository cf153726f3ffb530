"""Small datasets in the formats that the real ones have on disk."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import re
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from teamnet_pl import data


def pixels(count, size, channels=3, seed=0):
    """Noise, (count, size, size, channels) or without channels if grey."""
    shape = (count, size, size) + ((channels,) if channels > 1 else ())
    return np.random.default_rng([seed, count, size]).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, form="JPEG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form)
    return stream.getvalue()


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def tar(path, members):
    """Writes {name: bytes} as a tar, gzipped if so named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def files(folder, members):
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class OnDisk:
    """Writes datasets to a folder; each method returns the root to give to the data module.

    Checksums in the libraries become those of what was written.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.patch = monkeypatch

    def mnist(self, prefix=("train", "t10k"), folder="MNIST/raw", classes=10, first=0):
        for name, count in zip(prefix, (4 * classes, classes), strict=True):
            labels = np.arange(count) % classes + first
            for kind, array in (("images-idx3", pixels(count, 28, 1)), ("labels-idx1", labels)):
                content = {f"{name}-{kind}-ubyte.gz": gzip.compress(idx(array), 1)}
                files(self.folder / folder, content)
        return self.folder

    def fashion_mnist(self):
        return self.mnist(folder="FashionMNIST/raw")

    def emnist(self, variant="balanced", classes=47, first=0):
        """The zip that torchvision would download."""
        names = [f"emnist-{variant}-{part}" for part in ("train", "test")]
        self.mnist(names, "gzip", classes, first)
        path = self.folder / "EMNIST/raw/gzip.zip"
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as file:
            for member in sorted((self.folder / "gzip").iterdir()):
                file.write(member, f"gzip/{member.name}")
                member.unlink()
        self.patch.setattr(datasets.EMNIST, "md5", md5(path))
        return self.folder

    def cifar(self, reader, folder, archive, parts, key, classes):
        """The tar that torchvision would download."""
        members = {}
        for seed, (part, count) in enumerate(parts.items()):
            rows = pixels(count, 32, seed=seed).transpose(0, 3, 1, 2).reshape(count, -1)
            batch = {"data": rows, key: (np.arange(count) % classes).tolist()}
            members[part] = pickle.dumps(batch, protocol=2)
        meta = reader.meta["filename"]
        names = {reader.meta["key"]: [f"class {i}" for i in range(classes)]}
        members[meta] = pickle.dumps(names, protocol=2)
        sums = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
        path = self.folder / archive
        tar(path, {f"{folder}/{name}": content for name, content in members.items()})
        self.patch.setattr(reader, "tgz_md5", md5(path))
        for attribute in ("train_list", "test_list"):
            listed = [[name, sums[name]] for name, _ in getattr(reader, attribute)]
            self.patch.setattr(reader, attribute, listed)
        self.patch.setattr(reader, "meta", reader.meta | {"md5": sums[meta]})
        return self.folder

    def cifar10(self):
        parts = {f"data_batch_{i}": 10 for i in range(1, 6)} | {"test_batch": 10}
        return self.cifar(
            datasets.CIFAR10, "cifar-10-batches-py", "cifar-10-python.tar.gz", parts, "labels", 10
        )

    def cifar100(self):
        parts = {"train": 400, "test": 100}
        return self.cifar(
            datasets.CIFAR100,
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            parts,
            "fine_labels",
            100,
        )

    def svhn(self):
        listed = dict(datasets.SVHN.split_list)
        for split, count in {"train": 60, "test": 20}.items():
            path = self.folder / f"{split}_32x32.mat"
            # As in the files: images last, labels 1..10 in a column.
            content = {
                "X": pixels(count, 32).transpose(1, 2, 3, 0),
                "y": (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None],
            }
            scipy.io.savemat(path, content)
            listed[split] = [*listed[split][:2], md5(path)]
        self.patch.setattr(datasets.SVHN, "split_list", listed)
        return self.folder

    def photos(self, splits, form="JPEG", size=None, suffix="JPEG", classes=("n01", "n02", "n03")):
        """{file name: bytes} of photos of various sizes, by split and class."""
        found = {}
        for seed, (split, count) in enumerate(splits.items()):
            for i, name in enumerate(classes):
                for j in range(count):
                    image = pixels(1, size or 30 + j, seed=100 * seed + 10 * i + j)[0]
                    found[f"{split}/{name}/{name}_{j}.{suffix}"] = encoded(image, form)
        return found

    def image_folder(self, **kwargs):
        return files(self.folder, self.photos({"train": 8, "val": 2, "test": 3}, **kwargs))

    def imagenette(self):
        wnids = "n01440764", "n02102040", "n02979186"
        photos = self.photos({"train": 8, "val": 3}, classes=wnids)
        photos = {f"imagenette2-160/{name}": content for name, content in photos.items()}
        path = tar(self.folder / "imagenette2-160.tgz", photos)
        url = datasets.Imagenette._ARCHIVES["160px"][0]
        self.patch.setitem(datasets.Imagenette._ARCHIVES, "160px", (url, md5(path)))
        self.patch.setattr(data.Imagenette, "num_classes", 3)
        self.patch.setattr(data.Imagenette, "images", {"train": 24, "test": 9})
        return self.folder

    def imagenet(self):
        """The three archives of image-net.org, of three classes."""
        classes = ["n01", "n02", "n03"]
        photos = self.photos({"train": 8, "val": 3})
        tars = {}
        for name in classes:
            own = {
                Path(path).name: content
                for path, content in photos.items()
                if path.startswith(f"train/{name}/")
            }
            inner = tar(self.folder / "inner.tar", own)
            tars[f"{name}.tar"] = inner.read_bytes()
            inner.unlink()
        val = [(path, content) for path, content in photos.items() if path.startswith("val")]
        # The IDs in the devkit aren't in the order of the names.
        ids = {"n01": 2, "n02": 3, "n03": 1}
        truth = "".join(f"{ids[path.split('/')[1]]}\n" for path, _ in val)
        kinds = [
            ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"),
            ("num_children", "O"),
        ]  # fmt: skip
        rows = [(ids[name], name, f"class {name}", "", 0) for name in sorted(ids, key=ids.get)]
        rows.append((4, "n00", "all", "", 3))
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
        archives = {
            "train": tar(self.folder / "ILSVRC2012_img_train.tar", tars),
            "val": tar(
                self.folder / "ILSVRC2012_img_val.tar",
                {f"ILSVRC2012_val_{i:08}.JPEG": content for i, (_, content) in enumerate(val, 1)},
            ),
            "devkit": tar(
                self.folder / "ILSVRC2012_devkit_t12.tar.gz",
                {
                    "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
                    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": (
                        truth.encode()
                    ),
                },
            ),
        }
        for name, path in archives.items():
            self.patch.setitem(datasets.imagenet.ARCHIVE_META, name, (path.name, md5(path)))
        self.patch.setattr(data.ImageNet, "num_classes", 3)
        self.patch.setattr(data.ImageNet, "images", {"train": 24, "test": 9})
        return self.folder

    def tiny_imagenet(self):
        """The zip that would be downloaded."""
        names = "n01", "n02", "n03"
        path = self.folder / "tiny-imagenet-200.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:
            lines = []
            for i, name in enumerate(names):
                for j in range(8):
                    photo = encoded(pixels(1, 64, seed=10 * i + j)[0])
                    inner = f"train/{name}/images/{name}_{j}.JPEG"
                    file.writestr(f"tiny-imagenet-200/{inner}", photo)
                boxes = f"{name}_0.JPEG\t0\t0\t62\t62\n"
                file.writestr(f"tiny-imagenet-200/train/{name}/{name}_boxes.txt", boxes)
            for j in range(9):
                photo = encoded(pixels(1, 64, seed=90 + j)[0])
                file.writestr(f"tiny-imagenet-200/val/images/val_{j}.JPEG", photo)
                # Not sorted by class, as in the real file.
                lines.append(f"val_{j}.JPEG\t{names[(2 * j) % 3]}\t0\t32\t44\t62\n")
            file.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
            file.writestr("tiny-imagenet-200/wnids.txt", "\n".join(reversed(names)))
        self.patch.setattr(data.TinyImageNet, "md5", md5(path))
        self.patch.setattr(data.TinyImageNet, "num_classes", 3)
        self.patch.setattr(data.TinyImageNet, "images", {"train": 24, "test": 9})
        return self.folder

    def medmnist(self, name="pathmnist", size=28):
        from medmnist import INFO

        info = INFO[name]
        arrays, classes = {}, len(info["label"])
        for seed, (split, count) in enumerate({"train": 30, "val": 10, "test": 12}.items()):
            arrays[f"{split}_images"] = pixels(count, size, info["n_channels"], seed)
            arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
        suffix = "" if size == 28 else f"_{size}"
        path = self.folder / f"{name}{suffix}.npz"
        np.savez(path, **arrays)
        self.patch.setitem(info, f"MD5{suffix}", md5(path))
        return self.folder

    def shards(self, sizes, name="train", classes=3):
        """Tars of as many images each, named in braces."""
        number = 0
        for index, size in enumerate(sizes):
            members = {}
            for _ in range(size):
                image = pixels(1, 24, seed=number)[0]
                members[f"{number:04}.png"] = encoded(image, "PNG")
                members[f"{number:04}.cls"] = str(number % classes).encode()
                number += 1
            tar(self.folder / f"{name}-{index}.tar", members)
        return f"{self.folder}/{name}-{{0..{len(sizes) - 1}}}.tar"

    def litdata(self, numbers, name="train", chunk_size=9, sample=None, **kwargs):
        """Chunks of samples, each made of a number; by default dicts of a PNG file and a label."""
        from litdata.streaming import Cache

        writer = Cache(str(self.folder / name), chunk_size=chunk_size, **kwargs)
        for index, number in enumerate(numbers):
            writer[index] = (sample or self.png_and_label)(number)
        writer.done()
        writer.merge()
        return self.folder / name

    def png_and_label(self, number):
        return {"image": encoded(pixels(1, 24, seed=number)[0], "PNG"), "label": number % 3}

    def numbers_in(self, batches):
        """Of images of `shards` and `litdata`: which is which, and that each has its label."""
        known = {pixels(1, 24, seed=i)[0].tobytes(): i for i in range(40)}
        found = []
        for images, labels in batches:
            for image, label in zip(images, labels.tolist(), strict=True):
                found.append(known[image.permute(1, 2, 0).contiguous().numpy().tobytes()])
                assert label == found[-1] % 3
        return found

    def parquet(self, labels=None, kind="class", more=(), splits=("train", "validation", "test")):
        """Files as on the Hub: images as bytes, and the features in the schema.

        Args:
            labels: Of each split, from its number of rows; by default one of three in turn.
            kind: Of the label: "class", "list" or a type.
            more: Names of further columns with labels.
            splits: Names of the splits.
        """
        import datasets as library

        # Not in the home of who runs the tests.
        self.patch.setattr(library.config, "HF_DATASETS_CACHE", self.folder / "cache")
        root = self.folder / "parquet"
        (root / "data").mkdir(parents=True)
        feature = {
            "class": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"},
            "list": {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"},
        }.get(kind, {"dtype": kind, "_type": "Value"})
        for seed, (split, count) in enumerate(zip(splits, (30, 10, 12), strict=False)):
            values = labels(count) if labels else [i % 3 for i in range(count)]
            images = [
                {"bytes": encoded(image, "PNG"), "path": f"{split}_{i}.png"}
                for i, image in enumerate(pixels(count, 24, seed=seed))
            ]
            columns = {"img": images} | dict.fromkeys(("label", *more), values)
            features = {"img": {"_type": "Image"}} | dict.fromkeys(("label", *more), feature)
            table = pyarrow.table({name: pyarrow.array(own) for name, own in columns.items()})
            about = {"huggingface": json.dumps({"info": {"features": features}})}
            path = root / f"data/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(table.replace_schema_metadata(about), path)
        return root


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Writes datasets; see `OnDisk`. Besides: what it writes them with."""
    found = OnDisk(tmp_path / "disk", monkeypatch)
    found.folder.mkdir()
    found.stream = io.BytesIO
    for function in (encoded, md5, pixels, tar):
        setattr(found, function.__name__, function)
    return found


class Recorder(pl.LightningModule):
    """Keeps what it is given, and saves it for each process."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.seen, self.evaluated = folder, [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, _):
        self.seen += batch
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        self.evaluated += batch

    def on_fit_end(self):
        torch.save((self.seen, self.evaluated), self.folder / f"{self.global_rank}.pt")


@pytest.fixture
def record():
    """Two epochs of a `Recorder`, from a checkpoint if given; checkpoints every so many steps."""

    def run(folder, data, every=None, ckpt_path=None, **kwargs):
        model, callbacks = Recorder(folder), []
        if every:
            options = {"save_top_k": -1, "every_n_train_steps": every}
            callbacks = [pl.callbacks.ModelCheckpoint(folder, "{step}", **options)]
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, callbacks=callbacks, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=bool(callbacks), **kwargs,
        )  # fmt: skip
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model

    return run


@pytest.fixture
def serve():
    """Serves a folder by HTTP and returns its address; keeps a list of requests."""
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            start.requests.append(self.requestline)

        def do_GET(self):
            """Parts of files too, as object stores have it."""
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not part:
                return super().do_GET()
            first, last = map(int, part.groups())
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(content[first : last + 1])

    def start(folder):
        handler = functools.partial(Handler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    start.requests = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield start
    for server in servers:
        server.shutdown()
        server.server_close()

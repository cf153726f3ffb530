"""Small datasets in the formats that the real ones have on disk, and the batches made of them."""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision import datasets

from teamnet_pl import data
from teamnet_pl.data import ImageDataModule
from tests.helpers.images import encoded, pixels
from tests.helpers.teams import make_trainer


def idx(array: np.ndarray) -> bytes:
    """An array as the content of an idx file, MNIST's format."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def md5(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Writes files as a tar, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_files(folder: Path, members: Mapping[str, bytes]) -> Path:
    """Writes files to a folder."""
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_mnist(folder: Path, counts: Mapping[str, int], classes: int = 10, first: int = 0) -> Path:
    """Writes compressed idx files of noise.

    Args:
        folder: Where they go.
        counts: Number of images by the start of the names, such as ``train``.
        classes: Number of classes, which take turns.
        first: The first label.
    """
    for name, count in counts.items():
        labels = np.arange(count) % classes + first
        for kind, array in (("images-idx3", pixels(count, 28, 1)), ("labels-idx1", labels)):
            write_files(folder, {f"{name}-{kind}-ubyte.gz": gzip.compress(idx(array), 1)})
    return folder


def make_photos(
    splits: Mapping[str, int],
    form: str = "JPEG",
    size: int | None = None,
    suffix: str = "JPEG",
    classes: Sequence[str] = ("n01", "n02", "n03"),
) -> dict[str, bytes]:
    """Photos of various sizes by file name, as many of each class as a split is said to have."""
    photos = {}
    for seed, (split, count) in enumerate(splits.items()):
        for i, name in enumerate(classes):
            for j in range(count):
                image = pixels(1, size or 30 + j, seed=100 * seed + 10 * i + j)[0]
                photos[f"{split}/{name}/{name}_{j}.{suffix}"] = encoded(image, form)
    return photos


def numbered_image(number: int) -> np.ndarray:
    """The image that a number stands for, (24, 24, 3)."""
    image: np.ndarray = pixels(1, 24, seed=number)[0]
    return image


def png_and_label(number: int) -> dict[str, Any]:
    """The image and label that a number stands for, as a sample of litdata."""
    return {"image": encoded(numbered_image(number), "PNG"), "label": number % 3}


def numbers_in(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """The numbers that images stand for; checks that each image has its label."""
    known = {numbered_image(number).tobytes(): number for number in range(40)}
    numbers = []
    for images, labels in batches:
        for image, label in zip(images, labels.tolist(), strict=True):
            numbers.append(known[image.permute(1, 2, 0).contiguous().numpy().tobytes()])
            assert label == numbers[-1] % 3
    return numbers


class DatasetWriter:
    """Writes datasets to a folder; most methods return the root to give to the data module.

    Checksums in the libraries become those of the files written.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = monkeypatch

    def mnist(
        self,
        prefix: Sequence[str] = ("train", "t10k"),
        folder: str = "MNIST/raw",
        classes: int = 10,
        first: int = 0,
    ) -> Path:
        """Writes gzipped idx files."""
        counts = dict(zip(prefix, (4 * classes, classes), strict=True))
        write_mnist(self.folder / folder, counts, classes, first)
        return self.folder

    def fashion_mnist(self) -> Path:
        """Writes gzipped idx files."""
        return self.mnist(folder="FashionMNIST/raw")

    def emnist(self, variant: str = "balanced", classes: int = 47, first: int = 0) -> Path:
        """Writes the zip that torchvision would download."""
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

    def cifar(
        self,
        reader: type[datasets.CIFAR10],
        folder: str,
        archive: str,
        parts: Mapping[str, int],
        key: str,
        classes: int,
    ) -> Path:
        """Writes the tar that torchvision would download."""
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
        write_tar(path, {f"{folder}/{name}": content for name, content in members.items()})
        self.patch.setattr(reader, "tgz_md5", md5(path))
        for attribute in ("train_list", "test_list"):
            listed = [[name, sums[name]] for name, _ in getattr(reader, attribute)]
            self.patch.setattr(reader, attribute, listed)
        self.patch.setattr(reader, "meta", reader.meta | {"md5": sums[meta]})
        return self.folder

    def cifar10(self) -> Path:
        """Writes the tar that torchvision would download."""
        parts = {f"data_batch_{i}": 10 for i in range(1, 6)} | {"test_batch": 10}
        return self.cifar(
            datasets.CIFAR10, "cifar-10-batches-py", "cifar-10-python.tar.gz", parts, "labels", 10
        )

    def cifar100(self) -> Path:
        """Writes the tar that torchvision would download."""
        parts = {"train": 400, "test": 100}
        return self.cifar(
            datasets.CIFAR100,
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            parts,
            "fine_labels",
            100,
        )

    def svhn(self) -> Path:
        """Writes the files of MATLAB that torchvision would download."""
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

    def image_folder(self, **kwargs: Any) -> Path:
        """Writes a folder for each split and class."""
        photos = make_photos({"train": 8, "val": 2, "test": 3}, **kwargs)
        return write_files(self.folder, photos)

    def imagenette(self) -> Path:
        """Writes the tar that torchvision would download, of three classes."""
        wnids = "n01440764", "n02102040", "n02979186"
        photos = make_photos({"train": 8, "val": 3}, classes=wnids)
        photos = {f"imagenette2-160/{name}": content for name, content in photos.items()}
        path = write_tar(self.folder / "imagenette2-160.tgz", photos)
        url = datasets.Imagenette._ARCHIVES["160px"][0]
        self.patch.setitem(datasets.Imagenette._ARCHIVES, "160px", (url, md5(path)))
        self.patch.setattr(data.Imagenette, "num_classes", 3)
        self.patch.setattr(data.Imagenette, "images", {"train": 24, "test": 9})
        return self.folder

    def imagenet(self) -> Path:
        """Writes the three archives of image-net.org, of three classes."""
        classes = ["n01", "n02", "n03"]
        photos = make_photos({"train": 8, "val": 3})
        tars = {}
        for name in classes:
            class_photos = {
                Path(path).name: content
                for path, content in photos.items()
                if path.startswith(f"train/{name}/")
            }
            inner = write_tar(self.folder / "inner.tar", class_photos)
            tars[f"{name}.tar"] = inner.read_bytes()
            inner.unlink()
        val = [(path, content) for path, content in photos.items() if path.startswith("val")]
        # The IDs in the devkit are not in the order of the names.
        ids = {"n01": 2, "n02": 3, "n03": 1}
        truth = "".join(f"{ids[path.split('/')[1]]}\n" for path, _ in val)
        kinds = [
            ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"),
            ("num_children", "O"),
        ]  # fmt: skip
        names = sorted(classes, key=ids.__getitem__)
        rows = [(ids[name], name, f"class {name}", "", 0) for name in names]
        rows.append((4, "n00", "all", "", 3))
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
        archives = {
            "train": write_tar(self.folder / "ILSVRC2012_img_train.tar", tars),
            "val": write_tar(
                self.folder / "ILSVRC2012_img_val.tar",
                {f"ILSVRC2012_val_{i:08}.JPEG": content for i, (_, content) in enumerate(val, 1)},
            ),
            "devkit": write_tar(
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

    def tiny_imagenet(self) -> Path:
        """Writes the zip that would be downloaded."""
        names = "n01", "n02", "n03"
        path = self.folder / "tiny-imagenet-200.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:
            lines = []
            for i, name in enumerate(names):
                for j in range(8):
                    photo = encoded(pixels(1, 64, seed=10 * i + j)[0], "JPEG")
                    inner = f"train/{name}/images/{name}_{j}.JPEG"
                    file.writestr(f"tiny-imagenet-200/{inner}", photo)
                boxes = f"{name}_0.JPEG\t0\t0\t62\t62\n"
                file.writestr(f"tiny-imagenet-200/train/{name}/{name}_boxes.txt", boxes)
            for j in range(9):
                photo = encoded(pixels(1, 64, seed=90 + j)[0], "JPEG")
                file.writestr(f"tiny-imagenet-200/val/images/val_{j}.JPEG", photo)
                # Not sorted by class, as in the real file.
                lines.append(f"val_{j}.JPEG\t{names[(2 * j) % 3]}\t0\t32\t44\t62\n")
            file.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
            file.writestr("tiny-imagenet-200/wnids.txt", "\n".join(reversed(names)))
        self.patch.setattr(data.TinyImageNet, "md5", md5(path))
        self.patch.setattr(data.TinyImageNet, "num_classes", 3)
        self.patch.setattr(data.TinyImageNet, "images", {"train": 24, "test": 9})
        return self.folder

    def medmnist(self, name: str = "pathmnist", size: int = 28) -> Path:
        """Writes the file of NumPy that would be downloaded."""
        from medmnist import INFO

        info = INFO[name]
        arrays: dict[str, Any] = {}
        classes = len(info["label"])
        for seed, (split, count) in enumerate({"train": 30, "val": 10, "test": 12}.items()):
            arrays[f"{split}_images"] = pixels(count, size, info["n_channels"], seed)
            arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
        suffix = "" if size == 28 else f"_{size}"
        path = self.folder / f"{name}{suffix}.npz"
        np.savez(path, **arrays)
        self.patch.setitem(info, f"MD5{suffix}", md5(path))
        return self.folder

    def shards(self, sizes: Sequence[int], name: str = "train", classes: int = 3) -> str:
        """Writes tars of the given numbers of images; returns their names, with braces."""
        number = 0
        for index, size in enumerate(sizes):
            members = {}
            for _ in range(size):
                members[f"{number:04}.png"] = encoded(numbered_image(number), "PNG")
                members[f"{number:04}.cls"] = str(number % classes).encode()
                number += 1
            write_tar(self.folder / f"{name}-{index}.tar", members)
        return f"{self.folder}/{name}-{{0..{len(sizes) - 1}}}.tar"

    def litdata(
        self,
        values: Iterable[Any],
        name: str = "train",
        chunk_size: int = 9,
        sample: Callable[[Any], Any] = png_and_label,
        **kwargs: Any,
    ) -> Path:
        """Writes chunks of samples, each of which is made from a value."""
        from litdata.streaming import Cache

        writer = Cache(str(self.folder / name), chunk_size=chunk_size, **kwargs)
        for index, value in enumerate(values):
            writer[index] = sample(value)
        writer.done()
        writer.merge()
        return self.folder / name

    def parquet(
        self,
        labels: Callable[[int], Sequence[Any]] | None = None,
        kind: str = "class",
        more: Sequence[str] = (),
        splits: Sequence[str] = ("train", "validation", "test"),
    ) -> Path:
        """Writes files as on the Hub: images as bytes, and the features in the schema.

        Args:
            labels: The labels of a split, from its number of rows; by default 0, 1, 2 in turn.
            kind: Kind of the label: "class", "list" or the name of a type.
            more: Names of other columns with labels.
            splits: Names of the splits.
        """
        import datasets as library

        # Not in the home folder of the user who runs the tests.
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
            table = pyarrow.table({name: pyarrow.array(rows) for name, rows in columns.items()})
            about = {"huggingface": json.dumps({"info": {"features": features}})}
            path = root / f"data/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(table.replace_schema_metadata(about), path)
        return root


class FileServer:
    """Serves folders over HTTP, parts of files too, as object stores do.

    Attributes:
        requests: The first line of each request so far.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._servers: list[http.server.ThreadingHTTPServer] = []

    def start(self, folder: Path) -> str:
        """Serves a folder and returns its address."""
        handler = functools.partial(_Handler, self.requests, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def stop(self) -> None:
        """Stops serving all folders."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, requests: list[str], *args: Any, **kwargs: Any) -> None:
        self.requests = requests
        super().__init__(*args, **kwargs)

    def log_message(self, *_: Any) -> None:
        self.requests.append(self.requestline)

    def do_GET(self) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not part:
            super().do_GET()
            return
        first, last = map(int, part.groups())
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


class BatchRecorder(pl.LightningModule):
    """Records its batches; with a folder, each process saves them there.

    Attributes:
        seen: The training batches.
        evaluated: The validation batches.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[Sequence[torch.Tensor]] = []
        self.evaluated: list[Sequence[torch.Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Sequence[torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch: Sequence[torch.Tensor], _: int) -> None:
        self.evaluated.append(batch)

    def predict_step(self, batch: Sequence[torch.Tensor], _: int) -> torch.Tensor:
        return batch[1]

    def on_fit_end(self) -> None:
        if self.folder is not None:
            torch.save((self.seen, self.evaluated), self.folder / f"{self.global_rank}.pt")


def make_data_trainer(folder: Path | None = None, **kwargs: Any) -> pl.Trainer:
    """A quiet trainer that also validates, as trainers do by default."""
    return make_trainer(folder, **{"limit_val_batches": 1.0, "num_sanity_val_steps": 2} | kwargs)


def record_fit(
    folder: Path,
    data_module: ImageDataModule,
    every: int | None = None,
    ckpt_path: Path | None = None,
    **kwargs: Any,
) -> BatchRecorder:
    """Records the batches of two epochs.

    Args:
        folder: Where checkpoints go.
        data_module: The data.
        every: Number of steps from one checkpoint to the next; None for no checkpoints.
        ckpt_path: The checkpoint to resume from.
        **kwargs: Other arguments of the trainer.
    """
    model = BatchRecorder(folder)
    callbacks: list[pl.Callback] = []
    if every:
        keep_all = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=every)
        callbacks.append(keep_all)
    trainer = make_data_trainer(
        max_epochs=2, callbacks=callbacks, enable_checkpointing=bool(callbacks), **kwargs
    )
    trainer.fit(model, datamodule=data_module, ckpt_path=ckpt_path)
    return model


def flat(batches: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The images and labels of all batches in one list."""
    return [tensor for batch in batches for tensor in batch]


def same_tensors(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors are equal."""
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))

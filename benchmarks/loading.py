"""Throughput of data loaders, of the training step, and of both together.

Each dataset is written in its real format at its real image size, with random content, and loaded
with its standard augmentation. Measured in turn: the loader alone, which transfers uint8 that the
net's device normalizes (as the data modules do); the loader alone, which transfers float32 that its
workers normalize; the training step of a team alone; and loader and step together, as in training.
Example::

    python benchmarks/loading.py --out benchmarks/results/loading.json
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    in_turn,
    markdown,
    processor,
    selected,
    with_source,
)
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from teamnet_pl import LeaderConfig, Team, TeammateConfig
from teamnet_pl.data import HuggingFace, ImageDataModule, ImageFolder, RandomImages, Shards

CLASSES = 10
Batch = tuple[Tensor, Tensor]


def photo(seed: int, height: int, width: int, form: str = "JPEG") -> bytes:
    """Encodes an image that is as hard to decode as a photo: enlarged noise with some grain."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(256, size=(height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = generator.integers(-12, 13, size=image.shape)
    stream = io.BytesIO()
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(stream, form)
    return stream.getvalue()


def write_folders(root: Path, images: int, height: int, width: int) -> Path:
    """Writes JPEG files in a folder for each class."""
    for split, number in {"train": images, "val": CLASSES}.items():
        for i in range(number):
            path = root / split / f"class_{i % CLASSES}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(i, height, width))
    return root


def cifar(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """Noise in CIFAR's size, with its augmentation; torchvision holds CIFAR in memory, too."""
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return RandomImages(train_images=20_000, train_transform=augmentation, **options)


def cifar_rand_augment(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """The same with RandAugment and random erasing."""
    return cifar(root, args, extra_transform=[v2.RandAugment(), v2.RandomErasing()], **options)


def tiny_imagenet(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """JPEG files in the size of Tiny ImageNet."""
    return ImageFolder(root=write_folders(root, 4000, 64, 64), **options)


def cifar_parquet(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """PNG images in parquet files, like CIFAR on the Hub."""
    import pyarrow
    import pyarrow.parquet

    for split, number in {"train": 4000, "validation": CLASSES}.items():
        images = [{"bytes": photo(i, 32, 32, "PNG"), "path": f"{i}.png"} for i in range(number)]
        table = pyarrow.table({"image": images, "label": [i % CLASSES for i in range(number)]})
        features = '{"info": {"features": {"image": {"_type": "Image"}, "label": '
        features += '{"dtype": "int64", "_type": "Value"}}}}'
        table = table.replace_schema_metadata({"huggingface": features})
        pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return HuggingFace(path=str(root), **options)


def imagenet(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """JPEG files in the size of ImageNet."""
    root = write_folders(root, 600, 375, 500)
    return ImageFolder(root=root, image_size=args.photo_size, **options)


def imagenet_shards(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """The same in tar shards."""
    for shard in range(8):
        with tarfile.open(root / f"{shard}.tar", "w") as file:
            for i in range(shard, 600, 8):
                for ending, content in (("jpg", photo(i, 375, 500)), ("cls", b"%d" % (i % 10))):
                    info = tarfile.TarInfo(f"{i:05}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return Shards(
        num_classes=CLASSES,
        train_images=600,
        train=f"{root}/{{0..7}}.tar",
        val=f"{root}/0.tar",
        image_size=args.photo_size,
        buffer=50,
        **options,
    )


@dataclass
class Case:
    """A dataset, and a net that is usual for it."""

    title: str
    make: Callable[..., ImageDataModule]
    backbone: str


CASES = [
    Case("CIFAR, in memory", cifar, "cifar/resnet20"),
    Case("CIFAR, RandAugment", cifar_rand_augment, "cifar/resnet20"),
    Case("CIFAR, parquet", cifar_parquet, "cifar/resnet20"),
    Case("Tiny-ImageNet, JPEG", tiny_imagenet, "cifar/resnet20"),
    Case("ImageNet, JPEG", imagenet, "torchvision/resnet18"),
    Case("ImageNet, shards", imagenet_shards, "torchvision/resnet18"),
]


class Step:
    """Training steps of a team."""

    def __init__(self, args: argparse.Namespace, case: Case, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        net: dict[str, Any] = {"name": case.backbone}
        self.team = Team(
            CLASSES,
            shape,
            LeaderConfig(**net),
            TeammateConfig(**net),
            TeammateConfig(**net, interleaved=True),
        ).to(args.device)
        self.optimizer = torch.optim.SGD(self.team.parameters(), lr=0.01)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Takes one step."""
        self.optimizer.zero_grad()
        self.team.criterion(self.team(images), labels).backward()
        self.optimizer.step()


def endless(loader: Any) -> Iterator[Batch]:
    """Yields the batches of epoch after epoch."""
    while True:
        yield from loader


def images_per_second(
    args: argparse.Namespace, handle_batch: Callable[[], int], warmup: int
) -> float:
    """Measures a throughput over some seconds; the function returns its number of images."""
    for _ in range(warmup):
        handle_batch()
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < args.seconds or not images:
        images += handle_batch()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


def measure_case(args: argparse.Namespace, case: Case, workers: int) -> Row:
    """Measures one dataset with a number of workers."""
    with tempfile.TemporaryDirectory() as root:
        data = case.make(Path(root), args, batch_size=args.batch_size, num_workers=workers)
        data.setup("fit")
        step = Step(args, case, data.input_shape)

        def on_device(batch: Batch) -> Batch:
            images, labels = (part.to(args.device, non_blocking=True) for part in batch)
            return data.normalize(images), labels

        def load_uint8(batches: Iterator[Batch]) -> int:
            return len(on_device(next(batches))[1])

        def load_float32(batches: Iterator[Batch]) -> int:
            return len([part.to(args.device) for part in next(batches)][1])

        def train(batches: Iterator[Batch]) -> int:
            step(*fixed)
            return len(fixed[1])

        def load_and_train(batches: Iterator[Batch]) -> int:
            images, labels = on_device(next(batches))
            step(images, labels)
            return len(labels)

        def throughput(name: str, handle: Callable[[Iterator[Batch]], int]) -> float:
            loader = data.train_dataloader()
            if name == "float32":
                normalize_in_workers(loader, data)
            # Past the batches that were loaded ahead while nothing was timed.
            warmup = 1 if name == "step" else 1 + 2 * workers
            return images_per_second(args, partial(handle, endless(loader)), warmup)

        fixed = on_device(next(iter(data.train_dataloader())))
        handlers = {
            "uint8": load_uint8,
            "float32": load_float32,
            "step": train,
            "both": load_and_train,
        }
        rates = in_turn(
            {name: partial(throughput, name, handle) for name, handle in handlers.items()},
            args.repeats,
        )
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "data": case.title,
        "net": case.backbone,
        "shape": list(data.input_shape),
        "workers": workers,
        "images_per_second": rates,
        "loader_to_step": median["uint8"] / median["step"],
        "both_to_step": median["both"] / median["step"],
        "uint8_to_float32": median["uint8"] / median["float32"],
    }


def normalize_in_workers(loader: Any, data: ImageDataModule) -> None:
    """Changes a loader so that its workers normalize."""
    options = getattr(loader, "options", None)
    collate = options["collate_fn"] if options else loader.collate_fn

    def normalized(samples: list[Any]) -> Batch:
        images, labels = collate(samples)
        return data.normalize(images), labels

    if options:
        options["collate_fn"] = normalized
    else:
        loader.collate_fn = normalized


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each dataset and number of workers."""
    for case in selected(CASES, args.only):
        for workers in args.workers:
            yield measure_case(args, case, workers)


def line(row: Row) -> str:
    """Summarizes a row."""
    median = medians(row)
    return (
        f"{row['data']:20} {row['workers']} workers: loader {median['uint8']:.0f} images/s "
        f"(float32 {median['float32']:.0f}), step {median['step']:.0f}, both {median['both']:.0f} "
        f"({row['both_to_step']:.0%} of the step)"
    )


def medians(row: Row) -> dict[str, float]:
    """Computes the median throughputs of a row."""
    return {name: statistics.median(rates) for name, rates in row["images_per_second"].items()}


def table(result: Result) -> str:
    """Tabulates the throughputs of each dataset and number of workers."""
    header = [
        "data", "net", "workers", "loader, images/s", "loader with float32", "step",
        "loader and step", "loader and step / step",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        median = medians(row)
        rates = [f"{median[name]:,.0f}" for name in ("uint8", "float32", "step", "both")]
        net = f"{row['net']}, {row['shape'][1]}²"
        share = f"**{row['both_to_step']:.0%}**"
        rows.append([row["data"], net, str(row["workers"]), *rates, share])
    return with_source(markdown(header, rows), result)


def main() -> None:
    """Measures all datasets."""
    parser = argument_parser(
        __doc__,
        only=[case.title for case in CASES],
        repeats=5,
        threads=torch.get_num_threads(),
        device=True,
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--photo-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ResultFile(args, processor(args)).write(measure(args), line)


if __name__ == "__main__":
    main()

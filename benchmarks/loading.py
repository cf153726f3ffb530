"""Whether loading holds the step back: images a second of each loader alone and of the step.

Each dataset is written in its real format at its real image size, of random content, and loaded
with its standard recipe. Measured in turn, and the medians compared: the loader alone, with uint8
on the wire and normalised where the net is (as the data modules do) and with float32 that the
workers normalise; the training step of a team alone; and both together, as in training. Example::

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results_file import processor, save_results
from torch import Tensor
from torchvision.transforms import v2

from teamnet_pl import LeaderConfig, Team, TeammateConfig
from teamnet_pl.data import HuggingFace, ImageDataModule, ImageFolder, RandomImages, Shards

CLASSES = 10
Batch = tuple[Tensor, Tensor]


def photo(seed: int, height: int, width: int, form: str = "JPEG") -> bytes:
    """An encoded image, as hard to decode as a photo: enlarged noise with some grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(256, size=(height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = random.integers(-12, 13, size=image.shape)
    stream = io.BytesIO()
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(stream, form)
    return stream.getvalue()


def folder(root: Path, images: int, height: int, width: int) -> Path:
    """JPEG files in a folder for each class."""
    for split, number in {"train": images, "val": CLASSES}.items():
        for i in range(number):
            path = root / split / f"class_{i % CLASSES}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(i, height, width))
    return root


def small(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """CIFAR's images and recipe; torchvision holds them in memory, so noise is the same."""
    recipe = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return RandomImages(train_images=20_000, train_transform=recipe, **options)


def augmented(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """The same with RandAugment and random erasing."""
    return small(root, args, extra_transform=[v2.RandAugment(), v2.RandomErasing()], **options)


def tiny_photos(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """Tiny-ImageNet's JPEG files."""
    return ImageFolder(root=folder(root, 4000, 64, 64), **options)


def rows(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """PNG images in parquet, as CIFAR on the Hub."""
    import pyarrow
    import pyarrow.parquet

    for split, number in {"train": 4000, "validation": CLASSES}.items():
        images = [{"bytes": photo(i, 32, 32, "PNG"), "path": f"{i}.png"} for i in range(number)]
        table = pyarrow.table({"image": images, "label": [i % CLASSES for i in range(number)]})
        about = '{"info": {"features": {"image": {"_type": "Image"}, "label": '
        about += '{"dtype": "int64", "_type": "Value"}}}}'
        table = table.replace_schema_metadata({"huggingface": about})
        pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return HuggingFace(path=str(root), **options)


def photos(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
    """ImageNet's JPEG files."""
    root = folder(root, 600, 375, 500)
    return ImageFolder(root=root, image_size=args.photo_size, **options)


def shards(root: Path, args: argparse.Namespace, **options: Any) -> ImageDataModule:
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
    """A dataset, and the net that is usual for it."""

    title: str
    make: Callable[..., ImageDataModule]
    backbone: str


CASES = [
    Case("CIFAR, in memory", small, "cifar/resnet20"),
    Case("CIFAR, RandAugment", augmented, "cifar/resnet20"),
    Case("CIFAR, parquet", rows, "cifar/resnet20"),
    Case("Tiny-ImageNet, JPEG", tiny_photos, "cifar/resnet20"),
    Case("ImageNet, JPEG", photos, "torchvision/resnet18"),
    Case("ImageNet, shards", shards, "torchvision/resnet18"),
]


class Step:
    """Training steps of a team."""

    def __init__(self, args: argparse.Namespace, case: Case, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        net = {"name": case.backbone}
        self.team = Team(
            CLASSES,
            shape,
            LeaderConfig(**net),
            TeammateConfig(**net),
            TeammateConfig(**net, interleaved=True),
        ).to(args.device)
        self.optimizer = torch.optim.SGD(self.team.parameters(), lr=0.01)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.team.total_loss(self.team.losses(self.team(images), labels), 1.0).backward()
        self.optimizer.step()


def endless(loader: Any) -> Iterator[Batch]:
    """The batches of epoch after epoch."""
    while True:
        yield from loader


def rate(args: argparse.Namespace, run: Callable[[], int], warmup: int) -> float:
    """Images a second of what handles a batch of them each time, over some seconds."""
    for _ in range(warmup):
        run()
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < args.seconds or not images:
        images += run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


def measure(args: argparse.Namespace, case: Case, workers: int) -> dict[str, Any]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as root:
        data = case.make(Path(root), args, batch_size=args.batch_size, num_workers=workers)
        data.setup("fit")
        step = Step(args, case, data.input_shape)

        def on_device(batch: Batch) -> Batch:
            images, labels = (part.to(args.device, non_blocking=True) for part in batch)
            return data.normalize(images), labels

        def run_uint8(batches: Iterator[Batch]) -> int:
            return len(on_device(next(batches))[1])

        def run_float32(batches: Iterator[Batch]) -> int:
            return len([part.to(args.device) for part in next(batches)][1])

        def run_step(batches: Iterator[Batch]) -> int:
            step(*fixed)
            return len(fixed[1])

        def run_both(batches: Iterator[Batch]) -> int:
            images, labels = on_device(next(batches))
            step(images, labels)
            return len(labels)

        fixed = on_device(next(iter(data.train_dataloader())))
        runs = {"uint8": run_uint8, "float32": run_float32, "step": run_step, "both": run_both}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                loader = data.train_dataloader()
                if name == "float32":
                    normalized_by_workers(loader, data)
                batches = endless(loader)
                # Past what was loaded ahead while nothing was timed.
                warmup = 1 if name == "step" else 1 + 2 * workers
                found[name].append(rate(args, lambda r=run, b=batches: r(b), warmup))
                del batches, loader
        median = {name: statistics.median(rates) for name, rates in found.items()}
        return {
            "data": case.title,
            "net": case.backbone,
            "shape": list(data.input_shape),
            "workers": workers,
            "images_per_second": found,
            "loader_to_step": median["uint8"] / median["step"],
            "both_to_step": median["both"] / median["step"],
            "uint8_to_float32": median["uint8"] / median["float32"],
        }


def normalized_by_workers(loader: Any, data: ImageDataModule) -> None:
    """Has a loader serve what the net takes."""
    options = getattr(loader, "options", None)
    collate = options["collate_fn"] if options else loader.collate_fn

    def normalized(samples: list[Any]) -> Batch:
        images, labels = collate(samples)
        return data.normalize(images), labels

    if options:
        options["collate_fn"] = normalized
    else:
        loader.collate_fn = normalized


def main() -> None:
    """Measures all datasets and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--photo-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    titles = [case.title for case in CASES]
    parser.add_argument("--only", nargs="+", choices=titles, default=titles, metavar="TITLE")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES:
        if case.title not in args.only:
            continue
        for workers in args.workers:
            rows.append(row := measure(args, case, workers))
            median = {k: statistics.median(v) for k, v in row["images_per_second"].items()}
            print(
                f"{case.title:20} {workers} workers: loader {median['uint8']:.0f} images/s "
                f"(float32 on the wire {median['float32']:.0f}), step {median['step']:.0f}, "
                f"both {median['both']:.0f} ({row['both_to_step']:.0%} of the step)",
                flush=True,
            )
    save_results(args, rows, processor(args))


if __name__ == "__main__":
    main()

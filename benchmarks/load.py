"""A server under more requests than its deepest depth can answer.

`teamnet serve` runs on one thread, first with only the deepest depth and then with all depths. The
rate that the deepest depth keeps up with is measured first. Then requests arrive at one, two and
four times that rate, at random moments, whether or not earlier ones have been answered. Client and
server share the machine, over its loopback. Example::

    python benchmarks/load.py --out benchmarks/results/load.json --picture docs/load.png
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    depth_shares,
    markdown,
    with_source,
)
from matplotlib.figure import Figure
from PIL import Image

from teamnet_pl.deploy import Teammate
from teamnet_pl.pictures import add_legend, series_style

METHODS = {"budget": "all depths", "fixed": "the deepest depth"}


def teamnet(*words: Any) -> list[str]:
    """Makes the words of a command of the package."""
    return [sys.executable, "-m", "teamnet_pl", *map(str, words)]


def train(args: argparse.Namespace, folder: Path) -> Path:
    """Makes a checkpoint of a net that has seen one batch: only its times matter here."""
    words = ["--data", "Digits", "--data.init_args.image_size", args.size]
    words += ["--data.init_args.batch_size", 8, "--model.a.name", args.backbone]
    words += ["--model.a.depths", args.depths, "--model.leader", "null", "--model.b", "null"]
    for limit in ("max_epochs", "limit_train_batches", "limit_val_batches"):
        words += [f"--trainer.{limit}", 1]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    subprocess.run(teamnet("fit", *words), cwd=folder, check=True, capture_output=True)
    return folder / "logs/version_0/checkpoints/best.ckpt"


@contextmanager
def server(args: argparse.Namespace, checkpoint: Path, depths: list[str]) -> Iterator[str]:
    """Starts a server, and yields its address."""
    words = ["--ckpt_path", checkpoint, "--depths", json.dumps(depths), "--port", 0]
    words += ["--budget_ms", args.budget_ms, "--max_batch_size", args.batch_size]
    log = checkpoint.parent / "log"
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(teamnet("serve", *words), stderr=file, env=environment)
    try:
        for _ in range(1200):
            if match := re.search(r"running on (\S+)", log.read_text()):
                break
            time.sleep(0.1)
        else:
            sys.exit(f"The server did not start: {log.read_text()}")
        while httpx2.get(f"{match[1]}/readyz").status_code != 200:
            time.sleep(0.1)
        yield match[1]
    finally:
        process.terminate()
        process.wait(60)


def png(size: int) -> bytes:
    """Makes an image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Client:
    """Sends requests, and keeps status, latency in ms and depth of each."""

    def __init__(self, address: str, image: bytes) -> None:
        self.address = address
        self.image = image
        self.done: list[tuple[int | str, float, str]] = []

    async def send(self, client: httpx2.AsyncClient) -> None:
        """Sends one request."""
        begin = time.perf_counter()
        try:
            answer = await client.post(f"{self.address}/predict", content=self.image)
            status: int | str = answer.status_code
            depth = answer.json().get("depth", "")
        except httpx2.HTTPError as error:
            status, depth = type(error).__name__, ""  # lost
        self.done.append((status, 1000 * (time.perf_counter() - begin), depth))

    async def without_pause(self, seconds: float, workers: int) -> float:
        """Sends the next request after each answer; returns the answers per second."""
        async with self._connections() as client:
            until = time.perf_counter() + seconds

            async def work() -> None:
                while time.perf_counter() < until:
                    await self.send(client)

            begin = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(workers)))
            answered = sum(status == 200 for status, _, _ in self.done)
            return answered / (time.perf_counter() - begin)

    async def at_rate(self, rate: float, seconds: float) -> float:
        """Sends requests at random moments; returns the seconds until the last is answered."""
        moments = random.Random(0)
        async with self._connections() as client:
            begin = due = time.perf_counter()
            tasks = []
            while (due := due + moments.expovariate(rate)) < begin + seconds:
                await asyncio.sleep(max(0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(self.send(client)))
            await asyncio.gather(*tasks)
            return time.perf_counter() - begin

    def _connections(self) -> httpx2.AsyncClient:
        # The server closes idle connections after five seconds.
        limits = httpx2.Limits(
            max_connections=400, max_keepalive_connections=400, keepalive_expiry=2
        )
        return httpx2.AsyncClient(limits=limits, timeout=60)


def requests_by_status(address: str) -> dict[str, int]:
    """Reads the server's counts of requests."""
    text = httpx2.get(f"{address}/metrics").text
    counts = re.findall(r'^teamnet_requests_total{status="(\d+)"} (\S+)', text, re.MULTILINE)
    return {status: int(float(count)) for status, count in counts}


def measure_rate(args: argparse.Namespace, address: str, multiple: float, rate: float) -> Row:
    """Sends requests at a multiple of a rate, and counts the outcomes."""
    before = Counter(requests_by_status(address))
    client = Client(address, png(args.size))
    seconds = asyncio.run(client.at_rate(multiple * rate, args.seconds))
    counted = Counter(requests_by_status(address)) - before
    answered = [ms for status, ms, _ in client.done if status == 200]
    by_status = Counter(str(status) for status, _, _ in client.done)
    depths = Counter(depth for status, _, depth in client.done if status == 200)
    lost = sum(n for status, n in by_status.items() if status not in ("200", "503"))
    if not lost and counted != by_status:
        sys.exit(f"The server counts {dict(counted)}, the client {dict(by_status)}.")
    return {
        "multiple": multiple,
        "sent": len(client.done),
        "sent_per_second": len(client.done) / seconds,
        "answered_per_second": len(answered) / seconds,
        "in_time_per_second": sum(ms <= args.budget_ms for ms in answered) / seconds,
        "refused": by_status["503"] / len(client.done),
        "lost": lost,
        "by_status": dict(by_status),
        "p50_ms": float(np.percentile(answered, 50)) if answered else None,
        "p99_ms": float(np.percentile(answered, 99)) if answered else None,
        "depths": {depth: count / len(answered) for depth, count in depths.items()},
    }


def measure_capacity(args: argparse.Namespace, address: str) -> float:
    """Measures the rate of requests that a server keeps up with."""
    client = Client(address, png(args.size))
    asyncio.run(client.without_pause(args.seconds / 4, args.batch_size))  # warms up
    client.done.clear()
    return asyncio.run(client.without_pause(args.seconds / 2, args.batch_size))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each server and rate."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = train(args, Path(folder))
        depths = [depth.name for depth in Teammate.from_checkpoint(checkpoint).depths]
        capacity = 0.0
        for method, served in {"fixed": depths[:1], "budget": depths}.items():
            with server(args, checkpoint, served) as address:
                if method == "fixed":
                    capacity = measure_capacity(args, address)
                for multiple in args.multiples:
                    row = measure_rate(args, address, multiple, capacity)
                    yield {"method": method, "capacity_per_second": capacity, **row}


def line(row: Row) -> str:
    """Summarizes a row."""
    p99 = "" if row["p99_ms"] is None else f", p99 {row['p99_ms']:.0f} ms"
    return (
        f"{row['method']:6} {row['multiple']:g}x: {row['sent_per_second']:.0f} requests/s, "
        f"{row['in_time_per_second']:.0f} answered in time, {row['refused']:.0%} refused, "
        f"{row['lost']} lost{p99}, {depth_shares(row['depths'])}"
    )


def table(result: Result) -> str:
    """Tabulates the outcomes of the requests of each server and rate."""
    header = [
        "server with", "rate", "requests/s", "answers/s", "answers in time/s", "refused", "lost",
        "p99, ms", "depths",
    ]  # fmt: skip
    rows = [
        [
            METHODS[row["method"]],
            f"{row['multiple']:g}x",
            f"{row['sent_per_second']:.0f}",
            f"{row['answered_per_second']:.0f}",
            f"{row['in_time_per_second']:.0f}",
            f"{row['refused']:.1%}",
            str(row["lost"]),
            "" if row["p99_ms"] is None else f"{row['p99_ms']:.0f}",
            depth_shares(row["depths"]),
        ]
        for row in result["rows"]
    ]
    budget = f"Budget: {result['settings']['budget_ms']:.0f} ms."
    return with_source(f"{markdown(header, rows)}\n\n{budget}", result)


def draw(result: Result) -> Figure:
    """Draws answers in time, refused requests and latency, by the rate of requests."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    answers, refused, latency = figure.subplots(1, 3)
    for index, (method, label) in enumerate(METHODS.items()):
        rows = [row for row in result["rows"] if row["method"] == method]
        rates = [row["sent_per_second"] for row in rows]
        style = {"label": label, **series_style(index)}
        answers.plot(rates, [row["in_time_per_second"] for row in rows], **style)
        refused.plot(rates, [100 * row["refused"] for row in rows], **style)
        latency.plot(rates, [row["p99_ms"] for row in rows], **style)
    answers.axline((0, 0), slope=1, color="0.5", lw=1, ls=":", label="all requests")
    answers.set_ylabel("answers in time, 1/s")
    refused.set_ylabel("refused requests, %")
    latency.axhline(result["settings"]["budget_ms"], color="black", lw=1, ls="--")
    latency.set_ylabel("99th percentile of answers' latency, ms")
    answers.plot([], [], color="black", lw=1, ls="--", label="budget")
    for axes in (answers, refused, latency):
        axes.set_xlabel("requests, 1/s")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    add_legend(figure, answers)
    return figure


def main() -> None:
    """Measures both servers."""
    parser = argument_parser(__doc__)
    parser.add_argument("--backbone", default="torchvision/resnet50")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget-ms", type=float, default=500)
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 2, 4], help="of the rate")
    parser.add_argument("--seconds", type=float, default=20, help="of each rate")
    parser.add_argument("--picture", help="file of a picture to draw")
    args = parser.parse_args()
    file = ResultFile(args, f"{os.cpu_count()} CPU cores")
    file.write(measure(args), line)
    if args.picture:
        draw(file.result).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()

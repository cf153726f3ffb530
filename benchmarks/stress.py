"""Latency on a core that another process competes for: a budget against a fixed depth.

Each request follows the previous one without a pause. In the second of three phases, a process that
is always busy runs on the same core. All phases run once with a budget for each request, and once
at the deepest depth. Linux only. Example::

    python benchmarks/stress.py --out benchmarks/results/stress.json --picture docs/stress.png
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from teamnet_pl.backbones import BackboneConfig, create_backbone
from teamnet_pl.deploy import Predictor, Preprocessing
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.pictures import COLORS, add_legend

PHASES = ("before", "load", "after")
METHODS = {"budget": "a budget", "fixed": "the deepest depth"}


def make_predictor(args: argparse.Namespace) -> tuple[Predictor, dict[str, float]]:
    """Makes the predictor, and measures the cost of the views of its depths."""
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(args.backbone), num_classes=10, in_channels=3)
    shape = (3, args.size, args.size)
    net = ElasticNet(backbone, shape, depths=args.depths).eval()
    begin = time.perf_counter()
    views = [net.view(depth) for depth in net.depths]
    views_ms = 1000 * (time.perf_counter() - begin)
    shared = {tensor.data_ptr() for tensor in tensors(net)}
    copied = (t.nbytes for view in views for t in tensors(view) if t.data_ptr() not in shared)
    costs = {"views": len(views), "views_ms": views_ms, "views_bytes": sum(copied)}
    return Predictor(net, Preprocessing(shape, [0.5] * 3, [0.25] * 3)), costs


def tensors(net: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yields weights and statistics."""
    yield from net.parameters()
    yield from net.buffers()


def choice_us(predictor: Predictor, repeats: int = 10_000) -> float:
    """Measures the microseconds that the choice of another depth takes, without running it."""
    budgets = [predictor.controller.estimate_ms(depth) * 1.2 for depth in predictor.depths]
    begin = time.perf_counter()
    for i in range(repeats):
        predictor._views[predictor.controller.choose(budgets[i % len(budgets)])]
    return 1e6 * (time.perf_counter() - begin) / repeats


class Competitor:
    """A process that keeps a core busy."""

    def __init__(self, core: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        os.sched_setaffinity(self.process.pid, {core})

    def seconds(self) -> float:
        """Reads the time for which it has been running on the core."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def measure_phases(args: argparse.Namespace, predictor: Predictor, **request: Any) -> Iterator[Row]:
    """Sends requests in three phases; yields a row for each phase."""
    image = np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)
    origin = time.perf_counter()
    for phase in PHASES:
        competitor = Competitor(args.core) if phase == "load" else None
        begin = time.perf_counter()
        at, depths, latency = [], [], []
        while time.perf_counter() - begin < args.seconds:
            prediction = predictor.predict(image, **request)
            at.append(round(time.perf_counter() - origin, 4))
            depths.append(prediction.depth)
            latency.append(round(prediction.latency_ms, 3))
        share = competitor.seconds() / (time.perf_counter() - begin) if competitor else 0.0
        if competitor:
            competitor.stop()
        yield {
            "phase": phase,
            "competitor_share": share,
            "requests": len(at),
            "median_ms": float(np.median(latency)),
            "p95_ms": float(np.percentile(latency, 95)),
            "misses": float(np.mean(np.array(latency) > args.budget_ms)),
            "switches": sum(a != b for a, b in pairwise(depths)),
            "depths": {d: depths.count(d) / len(depths) for d in predictor.depths},
            "trace": {"at": at, "depth": depths, "latency_ms": latency},
        }


def measure(
    args: argparse.Namespace, predictor: Predictor, costs: dict[str, float]
) -> Iterator[Row]:
    """Yields a row for each method and phase."""
    requests: dict[str, dict[str, Any]] = {
        "budget": {"budget_ms": args.budget_ms},
        "fixed": {"depth": predictor.depths[0]},
    }
    for method, request in requests.items():
        for row in measure_phases(args, predictor, **request):
            yield {"method": method, **row, **costs}


def line(row: Row) -> str:
    """Summarizes a row."""
    return (
        f"{row['method']:7} {row['phase']:7} p95 {row['p95_ms']:.1f} ms, missed "
        f"{row['misses']:.1%}, {row['switches']} switches, {depth_shares(row['depths'])}"
    )


def table(result: Result) -> str:
    """Tabulates the latency of each method and phase."""
    header = [
        "request with", "phase", "core taken", "median, ms", "p95, ms", "over budget", "switches",
        "depths",
    ]  # fmt: skip
    rows = [
        [
            METHODS[row["method"]],
            row["phase"],
            f"{row['competitor_share']:.0%}",
            f"{row['median_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['misses']:.1%}",
            str(row["switches"]),
            depth_shares(row["depths"]),
        ]
        for row in result["rows"]
    ]
    first = result["rows"][0]
    costs = (
        f"Budget: {result['settings']['budget_ms']:.1f} ms. Choosing a depth took "
        f"{first['choice_us']:.1f} µs; the {first['views']} views took {first['views_ms']:.0f} ms "
        f"to make and copied {first['views_bytes']} bytes of weights."
    )
    return with_source(f"{markdown(header, rows)}\n\n{costs}", result)


def draw(result: Result) -> Figure:
    """Draws load, depth and latency over time."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    load, depth, latency = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2, 3])
    names = list(result["rows"][0]["depths"])[::-1]
    budget = result["settings"]["budget_ms"]
    labels = {"budget": f"with a budget of {budget:.0f} ms", "fixed": "at the deepest depth"}
    for index, (method, label) in enumerate(labels.items()):
        rows = [row for row in result["rows"] if row["method"] == method]
        traces = [row["trace"] for row in rows]
        at = [t for trace in traces for t in trace["at"]]
        style = {"color": COLORS[index], "zorder": 3 - index}
        steps = [names.index(d) for t in traces for d in t["depth"]]
        depth.step(at, steps, where="post", ls=("-", "--")[index], **style)
        points = [ms for t in traces for ms in t["latency_ms"]]
        latency.plot(at, points, ("o", "x")[index], ms=2.5, mew=0.7, label=label, **style)
    latency.axhline(budget, color="black", lw=1, ls="--", label="budget")
    for row in (row for row in result["rows"] if row["method"] == "budget"):
        ends = [row["trace"]["at"][0], row["trace"]["at"][-1]]
        load.fill_between(ends, 100 * row["competitor_share"], color="0.7")
    load.set_ylabel("core taken, %")
    load.set_ylim(0, 100)
    depth.set_ylabel("depth")
    depth.set_yticks(range(len(names)), names)
    latency.set_ylabel("latency, ms")
    latency.set_xlabel("time, s")
    latency.set_ylim(0)
    add_legend(figure, latency)
    for axes in (load, depth, latency):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Measures both methods."""
    parser = argument_parser(__doc__)
    parser.add_argument("--backbone", default="torchvision/resnet50")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of each phase")
    parser.add_argument("--slack", type=float, default=1.4, help="budget, as a multiple of the 95th percentile of the deepest depth alone")  # fmt: skip # noqa: E501
    parser.add_argument("--budget-ms", type=float, help="instead of --slack")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--picture", help="file of a picture to draw")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    predictor, costs = make_predictor(args)
    costs["choice_us"] = choice_us(predictor)
    if args.budget_ms is None:
        args.budget_ms = args.slack * predictor.controller.estimate_ms(predictor.depths[0])
    file = ResultFile(args, "1 CPU thread")
    file.write(measure(args, predictor, costs), line)
    if args.picture:
        draw(file.result).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()

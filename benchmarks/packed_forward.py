"""The packed step against the usual loop of one forward and backward for each depth.

Both run in turn in one process, in training mode, and the medians are compared. Peak memory is
measured in a process of its own for each. Two ratios tell how much there is to gain: that of
skippable blocks run, and that of all arithmetic (what is not skippable runs for every stream).
The second is the ceiling. Example::

    python benchmarks/packed_forward.py --out benchmarks/results/packed_forward.json
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from results_file import save_results
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teamnet_pl.backbones import BackboneConfig, create_backbone
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.streams import SkippableForward


@dataclass
class Case:
    """A net to measure."""

    title: str
    backbone: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("ResNet-20 (CIFAR)", "cifar/resnet20", 32),
    Case("ResNet-18", "torchvision/resnet18", 64),
    Case("ResNet-50", "torchvision/resnet50", 64),
    Case("ConvNeXt-T", "torchvision/convnext_tiny", 64),
    Case("ViT-Ti", "timm/vit_tiny_patch16_224", 64, {"img_size": 64, "patch_size": 8}),
]


class Steps:
    """One net and one batch; each method is a forward and backward at all depths."""

    def __init__(self, args: argparse.Namespace, case: Case) -> None:
        torch.manual_seed(0)
        config = BackboneConfig(case.backbone, case.options)
        backbone = create_backbone(config, num_classes=10, in_channels=3)
        shape = (3, case.size, case.size)
        self.net = ElasticNet(backbone, shape, depths=args.depths, policy=args.policy)
        self.net.train().to(args.device)
        self.images = torch.randn(args.batch_size, *shape, device=args.device)
        self.labels = torch.randint(0, 10, (args.batch_size,), device=args.device)

    def loop(self) -> None:
        """The usual way."""
        self.net.zero_grad()
        for depth in self.net.depths:
            with self.net.at(depth):
                F.cross_entropy(self.net(self.images), self.labels).backward()

    def packed(self) -> None:
        """All depths in one pass."""
        self.net.zero_grad()
        logits = self.net.packed(self.images)
        depths = len(self.net.depths)
        (F.cross_entropy(logits.flatten(0, 1), self.labels.repeat(depths)) * depths).backward()


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one step."""
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(args: argparse.Namespace, case: Case, method: str) -> int:
    """Bytes that two steps need beyond the net and its batch, in a fresh process."""
    torch.set_num_threads(args.threads)
    step = getattr(Steps(args, case), method)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        step(), step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(), step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process that are in memory, now (VmRSS) or at the peak (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def arithmetic(step: Callable[[], None]) -> int:
    """Floating-point operations of one step."""
    # The counter does not know fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """A row of the table."""
    steps = Steps(args, case)
    depths = steps.net.depths
    forks = [f.fork for f in steps.net._forwards.values() if isinstance(f, SkippableForward)]
    operations = {"loop": arithmetic(steps.loop), "packed": arithmetic(steps.packed)}
    times: dict[str, list[float]] = {"loop": [], "packed": []}
    for turn in range(args.repeats + 1):
        for method, found in times.items():
            taken = seconds(getattr(steps, method), args.device)
            if turn:  # the first one warms up
                found.append(taken)
    memory = {}
    for method in times:
        # A fresh process for each, so that neither inherits the other's peak.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            memory[method] = pool.submit(peak_memory, args, case, method).result()
    median = {method: statistics.median(found) for method, found in times.items()}
    speedup = median["loop"] / median["packed"]
    ceiling = operations["loop"] / operations["packed"]
    return {
        "net": case.title,
        "size": case.size,
        "blocks_per_stage": [list(depth.per_stage) for depth in depths],
        "loop_ms": [1000 * t for t in times["loop"]],
        "packed_ms": [1000 * t for t in times["packed"]],
        "speedup": speedup,
        "blocks_ratio": sum(d.blocks for d in depths) / sum(fork.run for fork in forks),
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "loop_bytes": memory["loop"],
        "packed_bytes": memory["packed"],
        "memory_ratio": memory["packed"] / max(memory["loop"], 1),
    }


def main() -> None:
    """Measures all nets and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--policy", default="last_stage_first")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", help="titles of the nets to measure")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and platform.system() == "Linux":
        # Keep freed memory, as CUDA's caching allocator does: by default glibc hands large tensors
        # back to the system and pays for every page anew.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

    rows = []
    for case in CASES:
        if args.only and case.title not in args.only:
            continue
        rows.append(row := measure(args, case))
        print(
            f"{row['net']:18} {row['speedup']:.2f} times as fast, ceiling {row['ceiling']:.2f} "
            f"({row['share_of_ceiling']:.0%}), blocks {row['blocks_ratio']:.2f}, "
            f"memory {row['memory_ratio']:.2f} times",
            flush=True,
        )
    on_gpu = args.device == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"
    save_results(args, rows, hardware)


if __name__ == "__main__":
    main()

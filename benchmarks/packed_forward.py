"""The packed step against the usual loop of one forward and backward for each depth.

The loop, the packed step and the packed step with gradient checkpointing run in turn in one
process, in training mode. Compared are medians, and peaks of memory for tensors beyond the net and
its batch. Two ratios tell how much there is to gain: that of skippable blocks run, and that of all
arithmetic (what is not skippable runs for every stream). The second is the ceiling. Example::

    python benchmarks/packed_forward.py --out benchmarks/results/packed_forward.json
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from results_file import processor, save_results
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teamnet_pl.backbones import BackboneConfig, create_backbone
from teamnet_pl.deploy.runtime.measuring import peak_bytes
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.forwards import SkippableForward


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

    def __init__(
        self, args: argparse.Namespace, case: Case, grad_checkpointing: bool = False
    ) -> None:
        torch.manual_seed(0)
        config = BackboneConfig(case.backbone, case.options)
        backbone = create_backbone(config, num_classes=10, in_channels=3)
        shape = (3, case.size, case.size)
        self.net = ElasticNet(
            backbone,
            shape,
            depths=args.depths,
            policy=args.policy,
            grad_checkpointing=grad_checkpointing,
        )
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


def all_steps(args: argparse.Namespace, case: Case) -> dict[str, Callable[[], None]]:
    """What is measured, by its name."""
    steps = Steps(args, case)
    checkpointed = Steps(args, case, grad_checkpointing=True)
    return {"loop": steps.loop, "packed": steps.packed, "checkpointed": checkpointed.packed}


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one step."""
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def arithmetic(step: Callable[[], None]) -> int:
    """Floating-point operations of one step."""
    # The counter does not know fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """A row of the table."""
    methods = all_steps(args, case)
    net = Steps(args, case).net
    forks = [f.fork for f in net._forwards.values() if isinstance(f, SkippableForward)]
    operations = {method: arithmetic(methods[method]) for method in ("loop", "packed")}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(args.repeats + 1):
        for method, step in methods.items():
            taken = seconds(step, args.device)
            if turn:  # the first one warms up
                times[method].append(taken)
    device = torch.device(args.device)
    memory = {method: peak_bytes(step, device) for method, step in methods.items()}
    median = {method: statistics.median(found) for method, found in times.items()}
    speedup = median["loop"] / median["packed"]
    ceiling = operations["loop"] / operations["packed"]
    return {
        "net": case.title,
        "size": case.size,
        "blocks_per_stage": [list(depth.per_stage) for depth in net.depths],
        "loop_ms": [1000 * t for t in times["loop"]],
        "packed_ms": [1000 * t for t in times["packed"]],
        "checkpointed_ms": [1000 * t for t in times["checkpointed"]],
        "speedup": speedup,
        "blocks_ratio": sum(d.num_blocks for d in net.depths)
        / sum(fork.num_running for fork in forks),
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "checkpointed_time_ratio": median["checkpointed"] / median["packed"],
        "loop_bytes": memory["loop"],
        "packed_bytes": memory["packed"],
        "checkpointed_bytes": memory["checkpointed"],
        "memory_ratio": memory["packed"] / memory["loop"],
        "checkpointed_memory_ratio": memory["checkpointed"] / memory["packed"],
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
    titles = [case.title for case in CASES]
    parser.add_argument("--only", nargs="+", choices=titles, default=titles, metavar="TITLE")
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
        if case.title not in args.only:
            continue
        rows.append(row := measure(args, case))
        print(
            f"{row['net']:18} {row['speedup']:.2f} times as fast, ceiling {row['ceiling']:.2f} "
            f"({row['share_of_ceiling']:.0%}), blocks {row['blocks_ratio']:.2f}, "
            f"memory {row['memory_ratio']:.2f} times; with checkpointing "
            f"{row['checkpointed_time_ratio']:.2f} times the time, "
            f"{row['checkpointed_memory_ratio']:.2f} times the memory",
            flush=True,
        )
    save_results(args, rows, processor(args))


if __name__ == "__main__":
    main()

"""Speed and memory of the packed step, against a loop of one forward and backward for each depth.

The loop, the packed step and the packed step with gradient checkpointing run in turn in one
process, in training mode. The table compares medians of their times, and peaks of the memory of all
tensors other than the net and its batch. Two ratios bound the gain: that of the skippable blocks
that run, and that of all arithmetic (layers that cannot be skipped run for every stream). The
second one is the ceiling. Example::

    python benchmarks/packed_forward.py --out benchmarks/results/packed_forward.json
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    in_turn,
    markdown,
    milliseconds,
    processor,
    selected,
    with_source,
)
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
        """Runs one depth after the other."""
        self.net.zero_grad()
        for depth in self.net.depths:
            with self.net.at(depth):
                F.cross_entropy(self.net(self.images), self.labels).backward()

    def packed(self) -> None:
        """Runs all depths in one pass."""
        self.net.zero_grad()
        logits = self.net.packed(self.images)
        depths = len(self.net.depths)
        (F.cross_entropy(logits.flatten(0, 1), self.labels.repeat(depths)) * depths).backward()


def arithmetic(step: Callable[[], None]) -> int:
    """Counts the floating-point operations of one step."""
    # The counter does not know fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure_net(args: argparse.Namespace, case: Case) -> Row:
    """Measures one net."""
    plain, checkpointed = Steps(args, case), Steps(args, case, grad_checkpointing=True)
    steps = {"loop": plain.loop, "packed": plain.packed, "checkpointed": checkpointed.packed}
    operations = {name: arithmetic(steps[name]) for name in ("loop", "packed")}
    measurements = {name: partial(milliseconds, step, args.device) for name, step in steps.items()}
    in_turn(measurements, 1)  # warms up
    times = in_turn(measurements, args.repeats)
    memory = {name: peak_bytes(step, torch.device(args.device)) for name, step in steps.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    speedup = median["loop"] / median["packed"]
    ceiling = operations["loop"] / operations["packed"]
    return {
        "net": case.title,
        "size": case.size,
        "blocks_per_stage": [list(depth.per_stage) for depth in plain.net.depths],
        **{f"{name}_ms": values for name, values in times.items()},
        "speedup": speedup,
        "blocks_ratio": blocks_ratio(plain.net),
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "checkpointed_time_ratio": median["checkpointed"] / median["packed"],
        **{f"{name}_bytes": peak for name, peak in memory.items()},
        "memory_ratio": memory["packed"] / memory["loop"],
        "checkpointed_memory_ratio": memory["checkpointed"] / memory["packed"],
    }


def blocks_ratio(net: ElasticNet) -> float:
    """Divides the number of skippable blocks that the loop runs by that of the packed step."""
    forwards = [f for f in net._forwards.values() if isinstance(f, SkippableForward)]
    return sum(depth.num_blocks for depth in net.depths) / sum(
        len(set(compress(forward.arriving, forward.kept))) for forward in forwards
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each net."""
    for case in selected(CASES, args.only):
        yield measure_net(args, case)


def line(row: Row) -> str:
    """Summarizes a row."""
    return (
        f"{row['net']:18} speed-up {row['speedup']:.2f}, ceiling {row['ceiling']:.2f} "
        f"({row['share_of_ceiling']:.0%}), blocks ratio {row['blocks_ratio']:.2f}, memory ratio "
        f"{row['memory_ratio']:.2f}; checkpointing: time ratio "
        f"{row['checkpointed_time_ratio']:.2f}, memory ratio "
        f"{row['checkpointed_memory_ratio']:.2f}"
    )


def table(result: Result) -> str:
    """Tabulates the times and ratios of each net."""
    header = [
        "net", "loop, ms", "packed, ms", "speed-up", "ceiling", "speed-up / ceiling",
        "blocks run: loop / packed", "peak memory: packed / loop",
        "time: with / without checkpointing", "memory: with / without",
    ]  # fmt: skip
    rows = [
        [
            f"{row['net']}, {row['size']}²",
            f"{statistics.median(row['loop_ms']):.0f}",
            f"{statistics.median(row['packed_ms']):.0f}",
            f"**{row['speedup']:.2f}**",
            f"{row['ceiling']:.2f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['blocks_ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['checkpointed_time_ratio']:.2f}",
            f"{row['checkpointed_memory_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    return with_source(markdown(header, rows), result)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory, as CUDA's caching allocator does.

    By default it returns large tensors to the system, and each of their pages is mapped anew.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Measures all nets."""
    parser = argument_parser(
        __doc__,
        only=[case.title for case in CASES],
        repeats=7,
        threads=torch.get_num_threads(),
        device=True,
    )
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--policy", default="last_stage_first")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and platform.system() == "Linux":
        keep_freed_memory()
    ResultFile(args, processor(args)).write(measure(args), line)


if __name__ == "__main__":
    main()

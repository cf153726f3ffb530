"""One ONNX file for all depths against a file for each, and 8-bit files, in onnxruntime.

For each net: the size of the one file over that of the deepest depth's own file; for each depth the
time of one batch in the one file, in the depth's own file and in its 8-bit file, in turn. The nets
have random weights, on which time and size do not depend. Example::

    python benchmarks/onnx_files.py --out benchmarks/results/onnx_files.json
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from packed_forward import CASES, Case
from results_file import save_results

from teamnet_pl.backbones import BackboneConfig, create_backbone
from teamnet_pl.deploy import save_onnx, save_onnx_all_depths, save_onnx_int8
from teamnet_pl.elastic import ElasticNet


def elastic_net(case: Case, depths: int) -> ElasticNet:
    """A net whose batch norms' statistics differ by depth, as after a training."""
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(case.backbone, case.options), 10, in_channels=3)
    net = ElasticNet(backbone, (3, case.size, case.size), depths=depths).train()
    with torch.no_grad():
        net.packed(torch.randn(8, 3, case.size, case.size))
    return net.eval()


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with all of onnxruntime's optimisations, as by default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bound(session: onnxruntime.InferenceSession, **inputs: np.ndarray) -> Callable[[], None]:
    """A run on inputs that onnxruntime holds already, so that Python's share is no part of it."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def times(runs: Sequence[Callable[[], Any]], repeats: int, seconds: float) -> list[list[float]]:
    """Milliseconds that each takes, once for each repeat, all in turn in an order that rotates."""
    numbers = []
    for run in runs:
        run()  # the first one allocates
        begin = time.perf_counter()
        run()
        numbers.append(max(1, round(seconds / (time.perf_counter() - begin))))
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats):
        for place in range(len(runs)):
            which = (turn + place) % len(runs)
            begin = time.perf_counter()
            for _ in range(numbers[which]):
                runs[which]()
            found[which].append(1000 * (time.perf_counter() - begin) / numbers[which])
    return found


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the ratios of neighbours in time, which a machine that slows down leaves."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def memory(paths: Sequence[Path], inputs: dict[str, Any]) -> int:
    """Bytes that sessions hold after a run of each, in a fresh process; Linux only."""
    # A fresh process, so that nothing freed before is used again.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_memory, paths, inputs).result()


def _memory(paths: Sequence[Path], inputs: dict[str, Any]) -> int:
    before = resident()
    sessions = [session(path, threads=1) for path in paths]
    for each in sessions:
        each.run(None, {value.name: inputs[value.name] for value in each.get_inputs()})
    ctypes.CDLL(None).malloc_trim(0)  # what loading alone needed
    return resident() - before


def resident() -> int:
    """Bytes of this process that are in memory; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measure(args: argparse.Namespace, case: Case, folder: Path) -> dict[str, Any]:
    """A row for each depth of a net."""
    net = elastic_net(case, args.depths)
    one_path = folder / "all_depths.onnx"
    save_onnx_all_depths(net, one_path)
    one = session(one_path, args.threads)
    images = torch.randn(args.batch_size, 3, case.size, case.size)
    inputs = {"images": images.numpy()}
    depths: list[dict[str, Any]] = []
    for depth in net.depths:
        own_path, int8_path = folder / f"{depth}.onnx", folder / f"{depth}.int8.onnx"
        save_onnx(net, depth, own_path)
        save_onnx_int8(own_path, int8_path, [torch.randn(8, 3, case.size, case.size)])
        own, int8 = session(own_path, args.threads), session(int8_path, args.threads)
        both = inputs | {"depth": np.array(depth.num_blocks)}
        logits = [one.run(None, both)[0], own.run(None, inputs)[0]]
        one_ms, own_ms, int8_ms = times(
            [bound(one, **both), bound(own, **inputs), bound(int8, **inputs)],
            args.repeats,
            args.seconds,
        )
        depths.append(
            {
                "depth": depth.name,
                "blocks_per_stage": list(depth.per_stage),
                "one_file_ms": one_ms,
                "own_file_ms": own_ms,
                "int8_ms": int8_ms,
                "time_ratio": ratio(one_ms, own_ms),
                "int8_time_ratio": ratio(int8_ms, own_ms),
                "own_file_bytes": own_path.stat().st_size,
                "int8_bytes": int8_path.stat().st_size,
                "largest_difference": float(np.abs(logits[0] - logits[1]).max()),
            }
        )
    size = one_path.stat().st_size
    own_paths = [folder / f"{depth}.onnx" for depth in net.depths]
    return {
        "net": case.title,
        "size": case.size,
        "one_file_bytes": size,
        "size_ratio": size / depths[0]["own_file_bytes"],
        "one_session_bytes": memory([one_path], both),
        "own_sessions_bytes": memory(own_paths, inputs),
        "depths": depths,
    }


def main() -> None:
    """Measures all nets and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one repeat")
    parser.add_argument("--threads", type=int, default=1)
    titles = [case.title for case in CASES]
    parser.add_argument("--only", nargs="+", choices=titles, default=titles, metavar="TITLE")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES:
        if case.title not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := measure(args, case, Path(folder)))
        ratios = ", ".join(
            f"{d['depth']} {d['time_ratio']:.3f} (8 bits {d['int8_time_ratio']:.2f})"
            for d in row["depths"]
        )
        print(f"{row['net']:18} size {row['size_ratio']:.3f}, time {ratios}", flush=True)
    save_results(
        args, rows, f"{args.threads} CPU threads", f"onnxruntime {onnxruntime.__version__}"
    )


if __name__ == "__main__":
    main()

"""A single ONNX file for all depths against a separate file for each, and 8-bit files.

For each net: the size of the single file over that of the deepest depth's separate file; for each
depth the time of one batch in the single file, in the depth's separate file and in its 8-bit file,
measured in turn in onnxruntime. The nets have random weights, on which time and size do not depend.
Example::

    python benchmarks/onnx_files.py --out benchmarks/results/onnx_files.json
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    in_turn,
    markdown,
    median_ratio,
    processor,
    selected,
    with_source,
)
from packed_forward import CASES, Case

from teamnet_pl.backbones import BackboneConfig, create_backbone
from teamnet_pl.deploy import save_onnx, save_onnx_all_depths, save_onnx_int8
from teamnet_pl.elastic import Depth, ElasticNet

Inputs = dict[str, np.ndarray]


def elastic_net(case: Case, depths: int) -> ElasticNet:
    """Makes a net whose batch norms' statistics differ by depth, as after a training."""
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(case.backbone, case.options), 10, in_channels=3)
    net = ElasticNet(backbone, (3, case.size, case.size), depths=depths).train()
    with torch.no_grad():
        net.packed(torch.randn(8, 3, case.size, case.size))
    return net.eval()


def make_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Makes a session with all of onnxruntime's optimizations, as by default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bound_run(session: onnxruntime.InferenceSession, inputs: Inputs) -> Callable[[], None]:
    """Binds the inputs, so that handing them over from Python takes no part of a run's time."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def measure_times(
    runs: Mapping[str, Callable[[], None]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Measures the milliseconds of each run, in turn; each repeat is a mean over some seconds."""

    def milliseconds(run: Callable[[], None], count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return 1000 * (time.perf_counter() - begin) / count

    measurements = {}
    for name, run in runs.items():
        run()  # the first one allocates
        count = max(1, round(1000 * seconds / milliseconds(run, 1)))
        measurements[name] = partial(milliseconds, run, count)
    return in_turn(measurements, repeats)


def session_bytes(paths: Sequence[Path], inputs: Inputs) -> int:
    """Measures the memory that sessions hold after a run of each; Linux only."""
    # A fresh process, so that nothing freed before is used again.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_session_bytes, paths, inputs).result()


def _session_bytes(paths: Sequence[Path], inputs: Inputs) -> int:
    before = resident_bytes()
    sessions = [make_session(path, threads=1) for path in paths]
    for session in sessions:
        session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    ctypes.CDLL(None).malloc_trim(0)  # frees the memory that only loading needed
    return resident_bytes() - before


def resident_bytes() -> int:
    """Reads how much of this process is in memory; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Files:
    """The files of a net in a folder: a single one for all depths, and two for each depth."""

    def __init__(self, net: ElasticNet, size: int, folder: Path) -> None:
        self.single = folder / "all_depths.onnx"
        self.separate = {depth.name: folder / f"{depth}.onnx" for depth in net.depths}
        self.int8 = {depth.name: folder / f"{depth}.int8.onnx" for depth in net.depths}
        save_onnx_all_depths(net, self.single)
        for depth in net.depths:
            save_onnx(net, depth, self.separate[depth.name])
            calibration = [torch.randn(8, 3, size, size)]
            save_onnx_int8(self.separate[depth.name], self.int8[depth.name], calibration)


def measure_depth(
    args: argparse.Namespace, files: Files, depth: Depth, images: np.ndarray
) -> dict[str, Any]:
    """Measures one depth in its three files."""
    paths = {
        "single_file": files.single,
        "separate_file": files.separate[depth.name],
        "int8": files.int8[depth.name],
    }
    sessions = {name: make_session(path, args.threads) for name, path in paths.items()}
    inputs = {name: {"images": images} for name in paths}
    inputs["single_file"]["depth"] = np.array(depth.num_blocks)
    single, separate = (
        sessions[name].run(None, inputs[name])[0] for name in ("single_file", "separate_file")
    )
    runs = {name: bound_run(session, inputs[name]) for name, session in sessions.items()}
    times = measure_times(runs, args.repeats, args.seconds)
    return {
        "depth": depth.name,
        "blocks_per_stage": list(depth.per_stage),
        **{f"{name}_ms": values for name, values in times.items()},
        "time_ratio": median_ratio(times["single_file"], times["separate_file"]),
        "int8_time_ratio": median_ratio(times["int8"], times["separate_file"]),
        "separate_file_bytes": paths["separate_file"].stat().st_size,
        "int8_bytes": paths["int8"].stat().st_size,
        "largest_difference": float(np.abs(single - separate).max()),
    }


def measure_net(args: argparse.Namespace, case: Case, folder: Path) -> Row:
    """Measures the files of one net."""
    net = elastic_net(case, args.depths)
    files = Files(net, case.size, folder)
    images = torch.randn(args.batch_size, 3, case.size, case.size).numpy()
    depths = [measure_depth(args, files, depth, images) for depth in net.depths]
    size = files.single.stat().st_size
    inputs = {"images": images, "depth": np.array(net.depths[-1].num_blocks)}
    return {
        "net": case.title,
        "size": case.size,
        "single_file_bytes": size,
        "size_ratio": size / depths[0]["separate_file_bytes"],
        "single_session_bytes": session_bytes([files.single], inputs),
        "separate_sessions_bytes": session_bytes(list(files.separate.values()), inputs),
        "depths": depths,
    }


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each net."""
    for case in selected(CASES, args.only):
        with tempfile.TemporaryDirectory() as folder:
            yield measure_net(args, case, Path(folder))


def line(row: Row) -> str:
    """Summarizes a row."""
    ratios = ", ".join(
        f"{depth['depth']} {depth['time_ratio']:.3f} (8-bit {depth['int8_time_ratio']:.2f})"
        for depth in row["depths"]
    )
    return f"{row['net']:18} size ratio {row['size_ratio']:.3f}, time ratio {ratios}"


def table(result: Result) -> str:
    """Tabulates the files of each net, and the times of each depth."""
    header = [
        "net", "single file, MB", "size: single / deepest", "memory: single / separate", "depth",
        "separate file, ms", "time: single / separate", "time: 8-bit / separate",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        net_cells = [
            f"{row['net']}, {row['size']}²",
            f"{row['single_file_bytes'] / 1e6:.2f}",
            f"**{row['size_ratio']:.3f}**",
            f"{row['single_session_bytes'] / row['separate_sessions_bytes']:.2f}",
        ]
        for depth in row["depths"]:
            cells = [
                depth["depth"],
                f"{statistics.median(depth['separate_file_ms']):.3g}",
                f"**{depth['time_ratio']:.3f}**",
                f"{depth['int8_time_ratio']:.2f}",
            ]
            rows.append([*net_cells, *cells])
            net_cells = [""] * len(net_cells)
    return with_source(markdown(header, rows), result)


def main() -> None:
    """Measures all nets."""
    parser = argument_parser(__doc__, only=[case.title for case in CASES], repeats=15, threads=1)
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one repeat")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = ResultFile(args, processor(args), f"onnxruntime {onnxruntime.__version__}")
    file.write(measure(args), line)


if __name__ == "__main__":
    main()

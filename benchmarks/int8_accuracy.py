"""Accuracy of each depth of trained Teammates before and after quantization to 8 bits.

Both run in onnxruntime. Validation images calibrate the ranges of the activations; the accuracy is
that of the test split. Example::

    teamnet fit --config digits
    python benchmarks/int8_accuracy.py --ckpt_path logs/version_0/checkpoints/best.ckpt \
        --out benchmarks/results/int8_accuracy.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

import onnxruntime
from harness import Result, ResultFile, Row, argument_parser, markdown, with_source

from teamnet_pl.deploy import Teammate, export_files
from teamnet_pl.deploy.checkpoint import SavedTeam


def measure_teammate(path: str, name: str, images: int) -> Iterator[Row]:
    """Yields a row for each depth of a Teammate."""
    saved = SavedTeam.read(path)
    data = saved.data_module()
    teammate = Teammate.from_saved(saved, name)
    with tempfile.TemporaryDirectory() as folder:
        manifest = export_files(
            teammate, folder, ["onnx", "onnx_int8"], data=data, calibration_images=images
        )
    for depth in manifest["depths"]:
        full, int8 = depth["files"]["onnx"], depth["files"]["onnx_int8"]
        yield {
            "data": type(data).__name__,
            "backbone": manifest["backbone"],
            "net": name,
            "depth": depth["name"],
            "accuracy": int8["test_accuracy_before"],
            "int8_accuracy": int8["test_accuracy"],
            "bytes": full["bytes"],
            "int8_bytes": int8["bytes"],
        }


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows of all Teammates of all checkpoints."""
    for path in args.ckpt_path:
        for name in args.teammates:
            yield from measure_teammate(path, name, args.images)


def line(row: Row) -> str:
    """Summarizes a row."""
    return (
        f"{row['data']} {row['backbone']} {row['net']}/{row['depth']} "
        f"{row['accuracy']:.2%} -> {row['int8_accuracy']:.2%}"
    )


def table(result: Result) -> str:
    """Tabulates the accuracy and the size of each depth."""
    header = [
        "data", "net", "depth", "accuracy, %", "8-bit accuracy, %", "difference, points",
        "file size: 8-bit / float",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        before, after = 100 * row["accuracy"], 100 * row["int8_accuracy"]
        rows.append(
            [
                row["data"],
                f"{row['backbone']}, {row['net']}",
                row["depth"],
                f"{before:.2f}",
                f"{after:.2f}",
                f"{after - before:+.2f}",
                f"{row['int8_bytes'] / row['bytes']:.2f}",
            ]
        )
    return with_source(markdown(header, rows), result)


def main() -> None:
    """Measures all Teammates."""
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt_path", nargs="+", required=True)
    parser.add_argument("--teammates", nargs="+", default=["a", "b"])
    parser.add_argument("--images", type=int, default=256, help="for calibration")
    args = parser.parse_args()
    file = ResultFile(args, f"onnxruntime {onnxruntime.__version__}")
    file.write(measure(args), line)


if __name__ == "__main__":
    main()

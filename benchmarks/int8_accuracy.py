"""What 8 bits cost in accuracy: each depth of trained Teammates, before and after, in onnxruntime.

Ranges are found by validation images, accuracy is that of the test split. Example::

    teamnet fit --config configs/digits.yaml
    python benchmarks/int8_accuracy.py --ckpt_path logs/version_0/checkpoints/best.ckpt \
        --out benchmarks/results/int8_accuracy.json
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import onnxruntime
from results_file import save_results

from teamnet_pl.deploy import Teammate, export_files
from teamnet_pl.deploy.checkpoint import SavedTeam


def measure(path: str, name: str, images: int) -> list[dict[str, Any]]:
    """A row for each depth of a Teammate."""
    saved = SavedTeam.read(path)
    data = saved.data_module()
    teammate = Teammate.from_saved(saved, name)
    with tempfile.TemporaryDirectory() as folder:
        manifest = export_files(
            teammate, folder, ["onnx", "onnx_int8"], data=data, calibration_images=images
        )
    return [
        {
            "data": type(data).__name__,
            "backbone": manifest["backbone"],
            "net": name,
            "depth": depth["name"],
            "accuracy": depth["files"]["onnx_int8"]["test_accuracy_before"],
            "int8_accuracy": depth["files"]["onnx_int8"]["test_accuracy"],
            "bytes": depth["files"]["onnx"]["bytes"],
            "int8_bytes": depth["files"]["onnx_int8"]["bytes"],
        }
        for depth in manifest["depths"]
    ]


def main() -> None:
    """Measures all Teammates and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", nargs="+", required=True)
    parser.add_argument("--teammates", nargs="+", default=["a", "b"])
    parser.add_argument("--images", type=int, default=256, help="that find the ranges")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in args.ckpt_path:
        for name in args.teammates:
            for row in measure(path, name, args.images):
                rows.append(row)
                print(
                    f"{row['data']} {row['backbone']} {row['net']}/{row['depth']} "
                    f"{row['accuracy']:.2%} -> {row['int8_accuracy']:.2%}",
                    flush=True,
                )
    save_results(args, rows, f"onnxruntime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()

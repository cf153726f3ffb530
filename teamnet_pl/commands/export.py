"""``teamnet export``: from a checkpoint to files for other programs."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

from teamnet_pl.deploy import Teammate, export_files
from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.deploy.files import Format


def export(
    ckpt_path: str,
    out: str,
    formats: list[Format],
    teammate: Literal["a", "b"] = "a",
    depths: list[int] | None = None,
    calibration_images: int = 256,
    trust_import: bool = False,
) -> None:
    """Exports a Teammate of a checkpoint, with a manifest of its depths.

    Args:
        ckpt_path: The checkpoint.
        out: Folder for the files and ``manifest.json``.
        formats: Kinds of files, such as ``[onnx_all_depths,safetensors]``. For each depth:
            safetensors (weights of the plain net), torch_export, onnx, onnx_int8 (quantised with
            the checkpoint's data), executorch. For several: onnx_all_depths, with the depth as an
            input; hub, a folder for the Hugging Face Hub.
        teammate: Which Teammate.
        depths: Which of its depths, by their number of blocks; by default all.
        calibration_images: Number of validation images that onnx_int8 finds ranges by.
        trust_import: Whether the checkpoint may name a backbone or data module by import path, or
            an address, which runs code: only for a file that you trust as you do code.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it has no such Teammate or depth, or the net cannot be exported.
        ModuleNotFoundError: If a library that a format needs is not installed.
    """
    saved = SavedTeam.read(ckpt_path, trust_import)
    chosen = Teammate.from_saved(saved, teammate)
    data = saved.data_module() if "onnx_int8" in formats else None
    manifest = export_files(chosen, out, formats, depths, data, calibration_images)
    table = Table("file", "bytes", "test accuracy", title=f"Teammate {teammate}, in {out}")
    files = list(manifest["files"].values())
    files += [entry for depth in manifest["depths"] for entry in depth["files"].values()]
    for entry in files:
        size = f"{entry['bytes']:,}" if "bytes" in entry else ""
        cost = ""
        if "test_accuracy" in entry:
            cost = f"{entry['test_accuracy']:.2%}, from {entry['test_accuracy_before']:.2%}"
        table.add_row(entry["path"], size, cost)
    Console().print(table)

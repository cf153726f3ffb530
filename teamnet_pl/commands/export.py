"""``teamnet export``: from a checkpoint to files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.deploy.export.files import (
    FormatName,
    describe_formats,
    export_files,
    needs_data,
)
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.places import short_path


def export_teammate(
    ckpt_path: str,
    out: str,
    formats: list[FormatName],
    teammate: str = "a",
    depths: list[int] | None = None,
    calibration_images: int = 256,
    trust_import: bool = False,
) -> None:
    """Exports a Teammate to files for other programs, with a manifest of its depths.

    Args:
        ckpt_path: The checkpoint, a folder that ``save_pretrained`` wrote, or the name of a
            repository on the Hub, such as ``me/net``.
        out: Folder for the files and ``manifest.json``.
        formats: Kinds of files, such as ``[onnx_all_depths,safetensors]``. {formats}
        teammate: Name of the Teammate in a checkpoint, such as ``a``.
        depths: Depths to export, by their number of blocks; by default all.
        calibration_images: Least number of validation images that calibrate onnx_int8. Only a
            checkpoint knows its data.
        trust_import: Whether the checkpoint may name a backbone or data module by import path, or
            an address, which runs code. Allow this only for a file that you trust as you trust
            code.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TeamNetError: If the checkpoint has no such Teammate or depth, or the net cannot be
            exported.
        ModuleNotFoundError: If a library that a format needs is not installed.
    """
    net = Teammate.load(ckpt_path, teammate, trust_import=trust_import)
    data = None
    if needs_data(formats) and Path(ckpt_path).is_file():
        data = SavedTeam.read(ckpt_path, trust_import).data_module()
    manifest = export_files(net, out, formats, depths, data, calibration_images)
    _print_files(manifest, title=f"Teammate {teammate}")
    print(f"Saved in {short_path(out)}, as manifest.json describes")


if export_teammate.__doc__:  # which becomes the help of --formats
    export_teammate.__doc__ = export_teammate.__doc__.replace("{formats}", describe_formats())


def _print_files(manifest: dict[str, Any], title: str) -> None:
    """Prints a table of the exported files."""
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes", "test accuracy", title=title)
    entries = list(manifest["files"].values())
    entries += [entry for depth in manifest["depths"] for entry in depth["files"].values()]
    for entry in entries:
        size = f"{entry['bytes']:,}" if "bytes" in entry else ""
        accuracy = ""
        if "test_accuracy" in entry:
            accuracy = f"{entry['test_accuracy']:.2%}, from {entry['test_accuracy_before']:.2%}"
        table.add_row(entry["path"], size, accuracy)
    Console().print(table)

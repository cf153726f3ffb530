"""Files of a Teammate in several formats, and a manifest that describes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.checkpoints import check_finite
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy.export.int8 import onnx_accuracy, save_onnx_int8
from teamnet_pl.deploy.export.onnx_file import save_onnx, save_onnx_all_depths
from teamnet_pl.deploy.export.programs import save_executorch, save_program
from teamnet_pl.deploy.export.weights import save_weights
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.elastic import DepthLike, ElasticNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

Format = Literal[
    "safetensors", "torch_export", "onnx", "onnx_int8", "executorch", "onnx_all_depths", "hub"
]
"""A kind of file. The last two hold several depths at once."""

_ONE_DEPTH: dict[str, tuple[str, Callable[[ElasticNet, DepthLike, Path], None]]] = {
    "safetensors": ("safetensors", save_weights),
    "torch_export": ("pt2", save_program),
    "onnx": ("onnx", save_onnx),
    "executorch": ("pte", save_executorch),
}
"""Suffix of a file of one depth, and the function that saves it."""

_REQUIRED = {
    "onnx": ("onnxscript", "onnx"),
    "onnx_int8": ("onnxruntime", "onnx"),
    "onnx_all_depths": ("onnxscript", "onnx"),
    "executorch": ("executorch", "executorch"),
}
"""The library that a format needs, and the extra that installs it."""


def export_files(
    teammate: Teammate,
    folder: str | Path,
    formats: Sequence[Format],
    depths: Sequence[DepthLike] | None = None,
    data: ImageDataModule | None = None,
    calibration_images: int = 256,
) -> dict[str, Any]:
    """Saves a Teammate in several formats, with a ``manifest.json``.

    The file of one depth is named after it (``d7.onnx``, ``d7.int8.onnx``). The others are
    ``all_depths.onnx`` and ``hub/``. The manifest holds the net's input and output, and for each
    depth the cost, the accuracy if it is known, and the files with their sizes in bytes.

    Args:
        teammate: The Teammate.
        folder: The folder for the files; it is made if it does not exist.
        formats: The formats.
        depths: Some of the Teammate's depths; by default all. ``hub`` always holds all.
        data: For ``onnx_int8``: the validation images calibrate the ranges of features, and the
            test split measures the accuracy before and after quantization.
        calibration_images: Least number of validation images that calibrate ``onnx_int8``.

    Returns:
        The manifest.

    Raises:
        TeamNetError: If there is no such format or depth, the net cannot be exported or has weights
            that are infinite or NaN, or there is no data for ``onnx_int8``.
        ModuleNotFoundError: If a library that a format needs is not installed.
    """
    _check_formats(formats)
    if "onnx_int8" in formats and data is None:
        raise TeamNetError(
            "onnx_int8 needs data to find the ranges of features, and there is none: the "
            "checkpoint does not say what it was trained on."
        )
    if calibration_images < 1:
        raise TeamNetError(f"calibration_images must be at least 1, found {calibration_images}.")
    check_finite(teammate.state_dict(), "The net")
    if "onnx_int8" in formats and data is not None:
        images = _validation_images(data, calibration_images)
    chosen = [teammate.depth(depth).name for depth in depths or teammate.depths]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(teammate, chosen)
    if "onnx_all_depths" in formats:
        path = folder / "all_depths.onnx"
        save_onnx_all_depths(teammate, path, chosen)
        manifest["files"]["onnx_all_depths"] = _file_entry(path)
    if "hub" in formats:
        teammate.save_pretrained(folder / "hub")
        manifest["files"]["hub"] = {"path": "hub"}
    for depth in manifest["depths"]:
        for kind in formats:
            if kind in _ONE_DEPTH:
                suffix, save = _ONE_DEPTH[kind]
                path = folder / f"{depth['name']}.{suffix}"
                save(teammate, depth["name"], path)
                depth["files"][kind] = _file_entry(path)
        if "onnx_int8" in formats and data is not None:
            path = folder / f"{depth['name']}.int8.onnx"
            accuracies = _save_int8(teammate, depth["name"], path, images, data)
            depth["files"]["onnx_int8"] = _file_entry(path) | accuracies
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def _check_formats(formats: Sequence[str]) -> None:
    known = ", ".join(get_args(Format))
    if not formats:
        raise TeamNetError(f"No format is given: choose from {known}.")
    for kind in formats:
        if kind not in get_args(Format):
            raise TeamNetError(f"There is no format {kind}: choose from {known}.")
        if kind in _REQUIRED:
            require(*_REQUIRED[kind])


def _manifest(teammate: Teammate, depths: Sequence[str]) -> dict[str, Any]:
    """Describes a Teammate and its depths, with no files yet."""
    return {
        "backbone": teammate.config.name,
        "num_classes": teammate.num_classes,
        "input_shape": list(teammate.input_shape),
        "preprocessing": teammate.preprocessing and asdict(teammate.preprocessing),
        "classes": teammate.classes,
        "accuracy_split": teammate.split,
        "depths": [
            asdict(record) | {"files": {}} for record in teammate.records() if record.name in depths
        ],
        "files": {},
    }


def _file_entry(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size}


def _validation_images(data: ImageDataModule, count: int) -> list[Tensor]:
    """Loads whole batches until there are at least `count` images, and normalizes them."""
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    batches: list[Tensor] = []
    for images, _ in data.val_dataloader():
        batches.append(data.normalize(images))
        if sum(map(len, batches)) >= count:
            break
    return batches


def _save_int8(
    teammate: Teammate, depth: str, path: Path, images: list[Tensor], data: ImageDataModule
) -> dict[str, float]:
    """Saves an 8-bit file; returns the test accuracy before and after quantization."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        save_onnx(teammate, depth, source)
        save_onnx_int8(source, path, images)
        return {
            name: onnx_accuracy(
                file,
                ((data.normalize(batch), labels) for batch, labels in data.test_dataloader()),
            )
            for name, file in {"test_accuracy": path, "test_accuracy_before": source}.items()
        }

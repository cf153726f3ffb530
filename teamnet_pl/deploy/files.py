"""Files of a Teammate in several formats, and a manifest of them."""

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
from teamnet_pl.deploy.export import save_executorch, save_program, save_weights
from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.int8 import onnx_accuracy, save_onnx_int8
from teamnet_pl.deploy.onnx_file import save_onnx, save_onnx_all_depths
from teamnet_pl.elastic import DepthLike, ElasticNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

Format = Literal[
    "safetensors", "torch_export", "onnx", "onnx_int8", "executorch", "onnx_all_depths", "hub"
]
"""A kind of file. The last two hold several depths at once."""

_OF_ONE_DEPTH: dict[str, tuple[str, Callable[[ElasticNet, DepthLike, Path], None]]] = {
    "safetensors": ("safetensors", save_weights),
    "torch_export": ("pt2", save_program),
    "onnx": ("onnx", save_onnx),
    "executorch": ("pte", save_executorch),
}
_NEEDS = {
    "onnx": ("onnxscript", "onnx"),
    "onnx_int8": ("onnxruntime", "onnx"),
    "onnx_all_depths": ("onnxscript", "onnx"),
    "executorch": ("executorch", "executorch"),
}


def export_files(
    teammate: Teammate,
    folder: str | Path,
    formats: Sequence[Format],
    depths: Sequence[DepthLike] | None = None,
    data: ImageDataModule | None = None,
    calibration_images: int = 256,
) -> dict[str, Any]:
    """Saves a Teammate in several formats, with ``manifest.json``.

    A depth's file is named by the depth (``d7.onnx``, ``d7.int8.onnx``), the others
    ``all_depths.onnx`` and ``hub/``. The manifest says what the net takes and returns, and of each
    depth the cost, the accuracy if known, and its files with their sizes in bytes.

    Args:
        teammate: The Teammate.
        folder: Where to.
        formats: Which formats.
        depths: Which of its depths, by default all; ``hub`` always holds them all.
        data: For ``onnx_int8``: its validation images find the ranges, and its test split measures
            the accuracy, of the 8-bit file and of the one it comes from.
        calibration_images: How many images find the ranges for ``onnx_int8``, at least.

    Returns:
        The manifest.

    Raises:
        ValueError: If there is no such format or depth, a net cannot be exported or has weights
            that are infinite or NaN, or ``onnx_int8`` lacks the data.
        ModuleNotFoundError: If a library that a format needs is not installed.
    """
    for each in formats:
        if each not in get_args(Format):
            raise TeamNetError(
                f"There is no format {each}: choose of {', '.join(get_args(Format))}."
            )
        if each in _NEEDS:
            require(*_NEEDS[each])
    if not formats:
        raise TeamNetError(f"No format is given: choose of {', '.join(get_args(Format))}.")
    if "onnx_int8" in formats and data is None:
        raise TeamNetError(
            "onnx_int8 takes data to find the ranges of features by, and there is none: the "
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
    manifest: dict[str, Any] = {
        "backbone": teammate.config.name,
        "num_classes": teammate.num_classes,
        "input_shape": list(teammate.input_shape),
        "preprocessing": teammate.preprocessing and asdict(teammate.preprocessing),
        "classes": teammate.classes,
        "accuracy_split": teammate.split,
        "depths": [
            asdict(record) | {"files": {}} for record in teammate.records() if record.name in chosen
        ],
        "files": {},
    }
    if "onnx_all_depths" in formats:
        path = folder / "all_depths.onnx"
        save_onnx_all_depths(teammate, path, chosen)
        manifest["files"]["onnx_all_depths"] = _entry(path)
    if "hub" in formats:
        teammate.save_pretrained(folder / "hub")
        manifest["files"]["hub"] = {"path": "hub"}
    for depth in manifest["depths"]:
        for each in formats:
            if each in _OF_ONE_DEPTH:
                suffix, save = _OF_ONE_DEPTH[each]
                path = folder / f"{depth['name']}.{suffix}"
                save(teammate, depth["name"], path)
                depth["files"][each] = _entry(path)
        if "onnx_int8" in formats and data is not None:
            path = folder / f"{depth['name']}.int8.onnx"
            accuracy = _save_int8(teammate, depth["name"], path, images, data)
            depth["files"]["onnx_int8"] = _entry(path) | accuracy
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size}


def _validation_images(data: ImageDataModule, count: int) -> list[Tensor]:
    """At least so many images, in whole batches."""
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
    """Saves an 8-bit file, and says what it costs in accuracy."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        save_onnx(teammate, depth, source)
        save_onnx_int8(source, path, images)
        files = {"test_accuracy": path, "test_accuracy_before": source}
        return {
            name: onnx_accuracy(
                file, ((data.normalize(own), labels) for own, labels in data.test_dataloader())
            )
            for name, file in files.items()
        }

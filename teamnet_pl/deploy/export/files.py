"""Files of a Teammate in several formats, and a manifest that describes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

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


class Requirement(NamedTuple):
    """A library that an extra of this package installs.

    Attributes:
        module: The module to import.
        extra: The extra that installs it.
    """

    module: str
    extra: str


class Calibration(NamedTuple):
    """The data that quantization needs.

    Attributes:
        data: Its test split measures the accuracy before and after quantization.
        images: Batches that set the ranges of features, normalized.
    """

    data: ImageDataModule
    images: list[Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        path: Name of the file or folder, in which ``{depth}`` stands for the name of a depth.
        content: What it holds, for the help of the command line.
        requires: The library that saves it, if an extra installs this.
    """

    path: str
    content: str
    requires: Requirement | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class DepthFormat(Format):
    """A format whose files hold one depth each.

    Attributes:
        save: Saves one depth of a net to a file.
    """

    save: Callable[[ElasticNet, DepthLike, Path], None]


@dataclass(frozen=True)
class QuantizedFormat(Format):
    """A format whose files hold one depth each, with weights and features of few bits.

    Attributes:
        save: Saves one depth of a net to a file, and returns measurements for the manifest.
    """

    save: Callable[[ElasticNet, DepthLike, Path, Calibration], dict[str, float]]


@dataclass(frozen=True)
class CombinedFormat(Format):
    """A format that holds several depths at once.

    Attributes:
        save: Saves the depths with these names.
    """

    save: Callable[[Teammate, Path, Sequence[str]], None]


def _save_int8(
    net: ElasticNet, depth: DepthLike, path: Path, calibration: Calibration
) -> dict[str, float]:
    """Saves an 8-bit file, and returns the test accuracy before and after quantization."""
    data = calibration.data
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        save_onnx(net, depth, source)
        save_onnx_int8(source, path, calibration.images)
        return {
            name: onnx_accuracy(
                file,
                ((data.normalize(batch), labels) for batch, labels in data.test_dataloader()),
            )
            for name, file in {"test_accuracy": path, "test_accuracy_before": source}.items()
        }


def _save_hub_folder(teammate: Teammate, path: Path, _depths: Sequence[str]) -> None:
    teammate.save_pretrained(path)  # with all depths


_ONNX = Requirement("onnxscript", "onnx")

FORMATS: dict[str, DepthFormat | QuantizedFormat | CombinedFormat] = {
    "safetensors": DepthFormat("{depth}.safetensors", "weights of the plain net", save_weights),
    "torch_export": DepthFormat("{depth}.pt2", "for torch.export.load", save_program),
    "onnx": DepthFormat("{depth}.onnx", "for onnxruntime and others", save_onnx, requires=_ONNX),
    "onnx_int8": QuantizedFormat(
        "{depth}.int8.onnx",
        "quantized to 8 bits with the checkpoint's data",
        _save_int8,
        requires=Requirement("onnxruntime", "onnx"),
    ),
    "executorch": DepthFormat(
        "{depth}.pte",
        "for phones and small boards",
        save_executorch,
        requires=Requirement("executorch", "executorch"),
    ),
    "onnx_all_depths": CombinedFormat(
        "all_depths.onnx",
        "the depth is an input",
        save_onnx_all_depths,
        requires=_ONNX,
    ),
    "hub": CombinedFormat("hub", "a folder for the Hugging Face Hub", _save_hub_folder),
}
"""The formats by name."""

if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[tuple(FORMATS)]  # which the command line checks and lists


def describe_formats() -> str:
    """Lists the formats with their content, for the help of the command line."""

    def listed(*kinds: type[Format]) -> str:
        chosen = {name: kind for name, kind in FORMATS.items() if isinstance(kind, kinds)}
        return ", ".join(f"{name} ({kind.content})" for name, kind in chosen.items())

    each, several = listed(DepthFormat, QuantizedFormat), listed(CombinedFormat)
    return f"One file for each depth: {each}. One for several depths: {several}."


def needs_data(formats: Sequence[FormatName]) -> bool:
    """Tells whether the data of the training are needed to save some formats."""
    return any(isinstance(FORMATS.get(name), QuantizedFormat) for name in formats)


def export_files(
    teammate: Teammate,
    folder: str | Path,
    formats: Sequence[FormatName],
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
    if needs_data(formats) and data is None:
        raise TeamNetError(
            "Quantization needs data to find the ranges of features, and there is none: the "
            "checkpoint does not say what it was trained on."
        )
    if calibration_images < 1:
        raise TeamNetError(f"calibration_images must be at least 1, found {calibration_images}.")
    check_finite(teammate.state_dict(), "The net")
    calibration = _calibration(data, calibration_images) if needs_data(formats) and data else None
    chosen = [teammate.depth(depth).name for depth in depths or teammate.depths]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(teammate, chosen)
    for name in formats:
        if isinstance(kind := FORMATS[name], CombinedFormat):
            path = folder / kind.path
            kind.save(teammate, path, chosen)
            manifest["files"][name] = _file_entry(path)
    for depth in manifest["depths"]:
        for name in formats:
            kind = FORMATS[name]
            path = folder / kind.path.format(depth=depth["name"])
            if isinstance(kind, DepthFormat):
                kind.save(teammate, depth["name"], path)
                depth["files"][name] = _file_entry(path)
            elif isinstance(kind, QuantizedFormat) and calibration:
                accuracies = kind.save(teammate, depth["name"], path, calibration)
                depth["files"][name] = _file_entry(path) | accuracies
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def _check_formats(formats: Sequence[str]) -> None:
    known = ", ".join(FORMATS)
    if not formats:
        raise TeamNetError(f"No format is given: choose from {known}.")
    for name in formats:
        if name not in FORMATS:
            raise TeamNetError(f"There is no format {name}: choose from {known}.")
        if requirement := FORMATS[name].requires:
            require(*requirement)


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
    size = {"bytes": path.stat().st_size} if path.is_file() else {}
    return {"path": path.name} | size


def _calibration(data: ImageDataModule, count: int) -> Calibration:
    """Loads whole batches of validation images until there are at least `count` images."""
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    batches: list[Tensor] = []
    for images, _ in data.val_dataloader():
        batches.append(data.normalize(images))
        if sum(map(len, batches)) >= count:
            break
    return Calibration(data, batches)

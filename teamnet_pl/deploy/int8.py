"""8-bit ONNX files, by onnxruntime's own quantiser."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require


def save_onnx_int8(source: str | Path, path: str | Path, images: Iterable[Tensor]) -> None:
    """Quantises an ONNX file of one depth to 8 bits.

    Weights are signed, with a scale for each channel; features are unsigned, with ranges from the
    smallest to the largest value that the images show: for that combination onnxruntime has the
    fastest operators. Layer norms stay as they are. On x86 processors without VNNI instructions
    sums may saturate, see onnxruntime's documentation of quantisation: measure the accuracy there.

    Args:
        source: A file that `save_onnx` wrote.
        path: The 8-bit file, which takes and returns what the source does.
        images: Batches to find ranges by, each ``(N, channels, height, width)``, normalised.

    Raises:
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
        ValueError: If there are no images.
    """
    quantization = require("onnxruntime.quantization", "onnx")
    preparation = require("onnxruntime.quantization.shape_inference", "onnx")
    registry = require("onnxruntime.quantization.registry", "onnx")
    batches = [{"images": batch.numpy()} for batch in images]
    if not batches:
        raise TeamNetError("To find the ranges of features takes some images, found none.")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        preparation.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            _Batches(batches),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            # Layer norm is cheap, and its weights have no channels to scale.
            op_types_to_quantize=[o for o in registry.QDQRegistry if o != "LayerNormalization"],
        )


class _Batches:
    """What onnxruntime reads the batches from, a `CalibrationDataReader`."""

    def __init__(self, batches: Iterable[dict[str, npt.NDArray[Any]]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next batch, or None after the last."""
        return next(self._left, None)


def onnx_accuracy(path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Measures an ONNX file of one depth with onnxruntime on the processor.

    Args:
        path: The file.
        batches: Images, each batch ``(N, channels, height, width)``, with labels, ``(N,)``.

    Returns:
        Share of the images whose label is predicted first.

    Raises:
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    onnxruntime = require("onnxruntime", "onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    right = [
        session.run(["logits"], {"images": images.numpy()})[0].argmax(-1) == labels.numpy()
        for images, labels in batches
    ]
    return float(np.concatenate(right).mean())

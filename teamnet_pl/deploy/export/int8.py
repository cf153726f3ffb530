"""8-bit ONNX files, quantized by onnxruntime."""

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
    """Quantizes an ONNX file of one depth to 8 bits.

    Weights are signed, with a scale for each channel. Features are unsigned, with ranges from the
    smallest to the largest value that occurs for the calibration images. onnxruntime has its
    fastest operators for this combination. Layer norms are not quantized. On x86 processors
    without VNNI instructions sums may saturate (see onnxruntime's documentation of quantization):
    measure the accuracy on such a processor.

    Args:
        source: A file that `save_onnx` wrote.
        path: The 8-bit file, with the same input and output as the source.
        images: Calibration batches, each ``(N, channels, height, width)``, normalized.

    Raises:
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
        TeamNetError: If there are no images.
    """
    quantization = require("onnxruntime.quantization", "onnx")
    preparation = require("onnxruntime.quantization.shape_inference", "onnx")
    registry = require("onnxruntime.quantization.registry", "onnx")
    batches = [{"images": batch.numpy()} for batch in images]
    if not batches:
        raise TeamNetError("Finding the ranges of features takes at least one image, found none.")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        preparation.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            _CalibrationReader(batches),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            # Layer norm is cheap, and its weights have no channels to scale.
            op_types_to_quantize=[o for o in registry.QDQRegistry if o != "LayerNormalization"],
        )


class _CalibrationReader:
    """Hands batches to onnxruntime, as its `CalibrationDataReader` does."""

    def __init__(self, batches: Iterable[dict[str, npt.NDArray[Any]]]) -> None:
        self._remaining = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Returns the next batch, or None after the last."""
        return next(self._remaining, None)


def onnx_accuracy(path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Measures the accuracy of an ONNX file of one depth, by onnxruntime on the CPU.

    Args:
        path: The file.
        batches: Images, each batch ``(N, channels, height, width)``, with their labels ``(N,)``.

    Returns:
        Top-1 accuracy, as a share from 0 to 1.

    Raises:
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    onnxruntime = require("onnxruntime", "onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    correct = [
        session.run(["logits"], {"images": images.numpy()})[0].argmax(-1) == labels.numpy()
        for images, labels in batches
    ]
    return float(np.concatenate(correct).mean())

from .export import (
    export_files,
    onnx_accuracy,
    save_executorch,
    save_onnx,
    save_onnx_all_depths,
    save_onnx_int8,
    save_program,
    save_weights,
)
from .runtime import Prediction, Predictor, Preprocessing, Profile
from .teammate import Teammate

__all__ = [
    "Prediction",
    "Predictor",
    "Preprocessing",
    "Profile",
    "Teammate",
    "export_files",
    "onnx_accuracy",
    "save_executorch",
    "save_onnx",
    "save_onnx_all_depths",
    "save_onnx_int8",
    "save_program",
    "save_weights",
]

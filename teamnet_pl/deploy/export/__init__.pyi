from .files import FORMATS, FormatName, export_files
from .int8 import onnx_accuracy, save_onnx_int8
from .onnx_file import save_onnx, save_onnx_all_depths
from .programs import save_executorch, save_program
from .weights import save_weights

__all__ = [
    "FORMATS",
    "FormatName",
    "export_files",
    "onnx_accuracy",
    "save_executorch",
    "save_onnx",
    "save_onnx_all_depths",
    "save_onnx_int8",
    "save_program",
    "save_weights",
]

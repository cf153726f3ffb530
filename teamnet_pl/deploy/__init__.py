"""A trained net at work: a budget at run time decides its depth, or a depth becomes a file."""

from teamnet_pl.deploy.export import save_executorch, save_program, save_weights
from teamnet_pl.deploy.files import export_files
from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.images import Preprocessing
from teamnet_pl.deploy.int8 import onnx_accuracy, save_onnx_int8
from teamnet_pl.deploy.onnx_file import save_onnx, save_onnx_all_depths
from teamnet_pl.deploy.predictor import Prediction, Predictor
from teamnet_pl.deploy.profile import Profile

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

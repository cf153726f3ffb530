"""A chosen depth outside training."""

from teamnet_pl.deploy.export import save_program, save_weights
from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.onnx_file import save_onnx, save_onnx_all_depths

__all__ = ["Teammate", "save_onnx", "save_onnx_all_depths", "save_program", "save_weights"]

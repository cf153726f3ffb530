"""What a run shows and leaves behind."""

from teamnet_pl.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from teamnet_pl.callbacks.dashboards import Dashboards
from teamnet_pl.callbacks.depth_report import DepthReport
from teamnet_pl.callbacks.prediction_writer import PredictionWriter

__all__ = ["BestCheckpoint", "Dashboards", "DepthReport", "LastCheckpoint", "PredictionWriter"]

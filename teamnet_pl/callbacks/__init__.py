"""What a run shows and leaves behind."""

from teamnet_pl.callbacks.depth_report import DepthReport

__all__ = ["DepthReport"]

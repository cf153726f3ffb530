"""Where a run's results go."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def results_folder(trainer: Trainer, resumed: bool = True) -> Path:
    """The folder of the checkpoint in use, or of those that are being written.

    Args:
        trainer: Runs, or has run.
        resumed: Whether the checkpoint that a fit goes on from is one in use.
    """
    if trainer.ckpt_path is not None and resumed:
        return Path(trainer.ckpt_path).parent
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(checkpoints or trainer.log_dir or trainer.default_root_dir)

"""The folder of a run's results."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from teamnet_pl.atomic import atomic_write_text
from teamnet_pl.places import numbered_names


def save_beside(path: Path, text: str) -> Path:
    """Writes a text file and replaces no other: where one differs, the name gets a number.

    Args:
        path: The file.
        text: Its content.

    Returns:
        The file that has the content.

    Raises:
        OSError: If it cannot be written.
    """
    for file in numbered_names(path):
        if not file.exists():
            atomic_write_text(file, text)
            break
        if file.is_file() and file.read_bytes() == text.encode():
            break
    return file


def results_folder(trainer: Trainer, resumed: bool = True) -> Path:
    """Returns the folder of the checkpoint in use, or of those that are being written.

    Args:
        trainer: The trainer of the run.
        resumed: Whether a checkpoint that a fit resumes from counts as in use.
    """
    if trainer.ckpt_path is not None and resumed:
        return Path(trainer.ckpt_path).parent
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(checkpoints or trainer.log_dir or trainer.default_root_dir)


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of the run itself, where ``checkpoints`` is by default.

    Args:
        trainer: The trainer of the run, in its first process.
    """
    folder = Path(trainer.default_root_dir)
    if not trainer.loggers:
        return folder
    logger = trainer.loggers[0]
    version = logger.version
    version = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or folder, str(logger.name), version)

"""``last-run``: the best checkpoint of the newest run that was started in the current folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from teamnet_pl.errors import TeamNetError
from teamnet_pl.places import short_path

LAST_RUN = "last-run"
"""The word that stands for the checkpoint."""
_NOTE = Path("logs/last-run")


def note_run(checkpoint: str | Path) -> None:
    """Notes a run's best checkpoint, whichever folder it is in; unless nothing can be written here.

    Args:
        checkpoint: The file.
    """
    with suppress(OSError):
        _NOTE.parent.mkdir(exist_ok=True)
        _NOTE.write_text(short_path(checkpoint))


def last_run() -> Path:
    """Returns the best checkpoint of the newest run.

    Raises:
        TeamNetError: If no run is noted here, or its checkpoint is gone.
    """
    if not _NOTE.is_file():
        raise TeamNetError(
            f"No run with a checkpoint was started in {Path.cwd()}: {_NOTE} is missing. Give the "
            "checkpoint itself, or call this where `teamnet fit` was called."
        )
    checkpoint = Path(_NOTE.read_text())
    if not checkpoint.is_file():
        raise TeamNetError(
            f"The newest run saved {checkpoint}, which is gone. Give another checkpoint."
        )
    return checkpoint

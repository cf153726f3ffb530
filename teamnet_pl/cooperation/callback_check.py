"""Callbacks that cannot work with a team, found before the training starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping

from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import close_names

_LOG_NOTHING_ELSE = ("lightning", "teamnet_pl")
"""Packages whose callbacks log no metric that another callback could monitor."""


def check_callbacks(callbacks: Sequence[Callback], metrics: Collection[str]) -> None:
    """Refuses callbacks that cannot work with a team.

    Args:
        callbacks: Those of the trainer.
        metrics: Names of the metrics that the team logs.

    Raises:
        TeamNetError: If there is such a callback.
    """
    if any(isinstance(callback, BackboneFinetuning) for callback in callbacks):
        raise TeamNetError(
            "BackboneFinetuning unfreezes the one `backbone` of a module, and a team has several: "
            "freeze the Leader by model.leader.frozen, or write a BaseFinetuning of your own for "
            "the modules in `team.backbones()`."
        )
    packages = {type(callback).__module__.partition(".")[0] for callback in callbacks}
    if not packages.issubset(_LOG_NOTHING_ELSE):
        return  # others may log any metric
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.monitor not in metrics:
            close = close_names(callback.monitor, metrics) or ["val/accuracy/mean"]
            raise TeamNetError(
                f"EarlyStopping monitors {callback.monitor}, which a team does not log. Monitor "
                f"{' or '.join(close)}, or another name that `metrics.csv` has."
            )

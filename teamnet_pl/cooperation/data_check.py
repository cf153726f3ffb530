"""Whether data match those that a team was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from teamnet_pl.errors import TeamNetError


def check_data(run: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Compares data with those of a run, by their classes and their preprocessing.

    Args:
        run: Values about the run, as in a checkpoint, see `Team.run`.
        description: As `ImageDataModule.describe` returns it; empty if there is none.

    Warns:
        UserWarning: If the data are normalized differently.

    Raises:
        TeamNetError: If the classes have other names.
    """
    _check_classes(run.get("classes"), description.get("classes"))
    trained, current = run.get("preprocessing"), description.get("preprocessing")
    if not isinstance(trained, Mapping) or current is None:
        return
    names = [name for name in ("mean", "std", "bits") if trained.get(name) != current[name]]
    if names:
        rank_zero_warn(
            "The team was trained, and predicts, with "
            + ", ".join(f"{name} {trained.get(name)}" for name in names)
            + "; this data has "
            + ", ".join(f"{name} {current[name]}" for name in names)
            + ". Accuracies may differ: set statistics or bits as in training."
        )


def _check_classes(trained: Sequence[str] | None, current: Sequence[str] | None) -> None:
    if not trained or not current or trained == current:
        return
    unnamed = [str(label) for label in range(len(trained))]
    if unnamed in (trained, current):
        return
    missing = [name for name in trained if name not in current]
    new = [name for name in current if name not in trained]
    difference = f"missing: {_abbreviated(missing)}; new: {_abbreviated(new)}"
    if not missing and not new:
        difference = f"the order is {_abbreviated(current)}, not {_abbreviated(trained)}"
    raise TeamNetError(
        f"The data has other classes than the team was trained on ({difference}). Name the "
        "classes as they were in training."
    )


def _abbreviated(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more

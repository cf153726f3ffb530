"""``teamnet configs``: the configs that come with the package."""

from __future__ import annotations

from teamnet_pl.config_files import config_names, config_summary


def list_configs() -> None:
    """Lists the configs that ``--config`` takes by name."""
    for name in config_names():
        print(f"{name:24}{config_summary(name)}")

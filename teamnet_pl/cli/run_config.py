"""The configuration of a run, for its folder, its loggers and its checkpoints."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from teamnet_pl import __version__
from teamnet_pl.callbacks.boards import boards
from teamnet_pl.callbacks.folder import run_folder
from teamnet_pl.cooperation import Team
from teamnet_pl.cooperation.report import member_costs
from teamnet_pl.settings import run_settings

_LIBRARIES = ("lightning", "numpy", "timm", "torchmetrics", "torchvision")


class SaveRunConfig(SaveConfigCallback):
    """Saves the config in the folder of the run, and hands it to loggers and checkpoints.

    Loggers get all of it as hyper-parameters, with the versions of the libraries and the cost of
    each depth. Checkpoints get the data module and the settings, as plain values.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the config once, and hands the team the part of it that checkpoints hold."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(pl_module, Team):
            config = self._plain_config()
            pl_module.run |= {"data": config["data"], "settings": run_settings(config)}

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the config in the folder, and with the loggers (Lightning's hook)."""
        path = run_folder(trainer) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, path, skip_none=False, overwrite=True)
        for board in boards(trainer.loggers):
            board.keep_file(path)
        if not isinstance(pl_module, Team):
            return
        # The team's part as Lightning logs it afterwards, so that no value is there twice.
        config = self._plain_config()
        del config["model"]
        values = dict(pl_module.hparams_initial) | config
        values |= {"versions": _versions(), "costs": _costs(pl_module)}
        for logger in trainer.loggers:
            logger.log_hyperparams(values)

    def _plain_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return config


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "teamnet_pl": __version__,
        "torch": torch.__version__,  # with the version of CUDA
        **{library: version(library) for library in _LIBRARIES},
    }


def _costs(team: Team) -> dict[str, dict[str, int]]:
    """Multiply-accumulates and parameters of each member."""
    costs = member_costs(team.elastic_nets, team.leader, team.input_shape)
    return {
        member: {"macs": cost.macs, "parameters": cost.parameters} for member, cost in costs.items()
    }

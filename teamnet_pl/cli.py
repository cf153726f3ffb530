"""The command line: ``teamnet fit``, ``validate``, ``test``, ``predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

from teamnet_pl.callbacks import DepthReport
from teamnet_pl.cooperation import Team
from teamnet_pl.data import ImageDataModule

_CONFIG_KEY = "teamnet_config"


class CheckpointedConfig(SaveConfigCallback):
    """Also saves what makes the team and its data in each checkpoint, as YAML text."""

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the config to a checkpoint."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint[_CONFIG_KEY] = yaml.safe_dump({key: config[key] for key in ("model", "data")})


class TeamCLI(LightningCLI):
    """`LightningCLI` for a `Team` on any `ImageDataModule`.

    The dataset tells the team its number of classes and its image shape. A checkpoint brings its
    config along: ``teamnet test --ckpt_path FILE`` needs no other, and what else is given overrides
    it.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, and what the data tells the team."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(DepthReport, "report")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy/mean",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with a test of the best checkpoint.",
        )
        for name in ("num_classes", "input_shape"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, after the config of the checkpoint that it names."""
        if args is None:
            args = sys.argv[1:]
            sys.argv = sys.argv[:1]  # or Lightning warns that they were given twice
        if isinstance(args, list):
            args = _with_checkpointed_config(args)
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's own lets a checkpoint override the command line."""

    def after_fit(self) -> None:
        """Tests the best checkpoint, if asked for."""
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best")


def _with_checkpointed_config(args: list[str]) -> list[str]:
    """Puts the config of a named checkpoint in front of all other options."""
    for index, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name == "--ckpt_path":
            path = value if equals else "".join(args[index + 1 : index + 2])
            if Path(path).is_file():
                # Only tensors and plain values: nothing in the file is run.
                checkpoint = torch.load(path, map_location="meta", mmap=True, weights_only=True)
                if _CONFIG_KEY in checkpoint:
                    return [args[0], "--config", checkpoint[_CONFIG_KEY], *args[1:]]
    return args


def main(args: ArgsType = None) -> None:
    """Runs the command line."""
    TeamCLI(
        Team,
        ImageDataModule,
        subclass_mode_data=True,
        save_config_callback=CheckpointedConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs", "name": ""},
            }
        },
        parser_kwargs={"parser_mode": "yaml"},
        # The team keeps its own: Lightning's lack what the data tells the team.
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
    )


if __name__ == "__main__":
    main()

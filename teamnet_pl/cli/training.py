"""The subcommands of LightningCLI: ``teamnet fit``, ``validate``, ``test``, ``predict``."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, callbacks, loggers
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from teamnet_pl import cooperation, data
from teamnet_pl.callbacks import (
    BestCheckpoint,
    Dashboards,
    DepthReport,
    LastCheckpoint,
    PredictionWriter,
)
from teamnet_pl.checkpoints import count_weights, limit_parameters
from teamnet_pl.cli.checkpoint_config import FROM_DATA, with_checkpointed_config
from teamnet_pl.cli.last_run import LAST_RUN, note_run
from teamnet_pl.cli.parser import SpellingParser
from teamnet_pl.cli.run_config import SaveRunConfig
from teamnet_pl.cli.words import given_values, subcommand_of
from teamnet_pl.cooperation import Team
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.errors import TeamNetError, underlying_error
from teamnet_pl.places import short_path
from teamnet_pl.training import evaluate_best, save_atomically


class TeamArgumentParser(SpellingParser, LightningArgumentParser):
    """Also knows the names of configs and data modules, and says where other values come from.

    Attributes:
        checkpoint: The file that brought values which the command line does not have.
    """

    checkpoint: str | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message, with the checkpoint that brought values, and exits."""
        if self.checkpoint is not None and self.checkpoint not in message:
            message += f"\nThe values that are not given come from {self.checkpoint}."
        super().error(message, ex)

    def known_names(self) -> Iterable[str]:
        """Yields options, classes and the fields of configs."""
        yield from super().known_names()
        yield from callbacks.__all__
        yield from loggers.__all__
        for module in (cooperation, data):
            for name in module.__all__:
                yield name
                public = getattr(module, name)
                if is_dataclass(public):
                    yield from (field.name for field in fields(public))


class TeamCLI(LightningCLI):
    """`LightningCLI` for a `Team` on any `ImageDataModule`.

    The dataset tells the team its number of classes and its image shape. A checkpoint brings its
    config along: ``teamnet test --ckpt_path FILE`` needs no other, and what else is given overrides
    it.
    """

    saved: SavedTeam | None = None
    has_logger = True

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Turns Lightning's own table of metrics off, since `DepthReport` prints one."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, and what the data tells the team."""
        # The first one is the trainer's `checkpoint_callback`.
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(DepthReport, "report")
        parser.add_lightning_class_args(Dashboards, "dashboards")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with a test of the best checkpoint.",
        )
        parser.add_argument(
            "--trust_import",
            type=bool,
            default=False,
            help="Whether the checkpoint may name backbones, data modules and transforms by import "
            "path, and addresses, which runs code: only for a file that you trust as you do code.",
        )
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, after the config of the checkpoint that it names."""
        if not isinstance(args, list):
            super().parse_arguments(parser, args)
            return
        try:
            words, self.saved = with_checkpointed_config(args)
        except (FileNotFoundError, TeamNetError) as error:
            parser.error(str(error))
        if self.saved is not None:
            for one in (parser, *self._subcommand_parsers.values()):
                assert isinstance(one, TeamArgumentParser)
                one.checkpoint = str(self.saved.path)
        subcommand = subcommand_of(words)
        # An evaluation leaves its files beside the checkpoint, and no folder of a run that is none.
        self.has_logger = subcommand == "fit" or any(
            name.startswith("trainer.logger") for name in given_values(args)
        )
        if subcommand is not None:
            chosen = self._subcommand_parsers[subcommand]
            assert isinstance(chosen, TeamArgumentParser)
            words = chosen.with_lists(words)
        self.config = parser.parse_args(words)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's own lets a checkpoint override the command line."""

    def instantiate_classes(self) -> None:
        """Makes team, data and trainer; wrong values are refused without a traceback."""
        # A member that the user replaces may be of any size, but then the weights do not fit.
        saved = self.saved
        limit = limit_parameters(count_weights(saved.weights), saved.path) if saved else None
        try:
            with limit or nullcontext():
                super().instantiate_classes()
        except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
            self._parser(self.subcommand).error(str(underlying_error(error) or error))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leaves out the checkpoints or the logger where they are off.

        Raises:
            TeamNetError: If Lightning refuses a value, such as of devices.
        """
        if config.get("enable_checkpointing") is False:
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        if not self.has_logger:
            config["logger"] = False
            self.save_config_callback = None
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise TeamNetError(str(error)) from error

    def before_fit(self) -> None:
        """Has checkpoints saved whole or not at all, unless the user chose another plugin."""
        save_atomically(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; errors that a user can mend are printed without a traceback."""
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:  # with which Lightning would end with the status of success
            sys.exit(128 + signal.SIGTERM)
        except SystemExit as ending:
            if isinstance(ending.__context__, KeyboardInterrupt):
                sys.exit(128 + signal.SIGINT)
            raise
        except (MisconfigurationException, OSError, TeamNetError) as error:
            self._parser(subcommand).error(str(error))
        except Exception as error:
            # Lightning holds a checkpoint only while it takes a run's state from it.
            if not self.trainer._checkpoint_connector._loaded_checkpoint:
                raise
            path = self.saved.path if self.saved else "The checkpoint"
            self._parser(subcommand).error(
                f"{path} does not hold the state that a run resumes from, or is damaged "
                f"({type(error).__name__}): {error}"
            )
        finally:
            if subcommand == "fit":
                self._note_best()

    def after_fit(self) -> None:
        """Tests the best checkpoint, if asked for."""
        if self._get(self.config, "test_after_fit"):
            evaluate_best(self.trainer, self.model, self.datamodule)

    def _note_best(self) -> None:
        """Notes the best checkpoint of a fit, even of one that was stopped, and tells its place."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best and self.trainer.is_global_zero:
            note_run(best)
            print(f"The best checkpoint is {short_path(best)}: teamnet test --ckpt_path {LAST_RUN}")


_NOT_NEWS = ("💡 Tip", "GPU available: False", "TPU available: False", "`weights_only` was not set")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOT_NEWS)


def _silence_libraries() -> None:
    """Leaves out messages and warnings of libraries about which a user can do nothing."""
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    # The data module chooses their number.
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")


def run_training(args: ArgsType) -> None:
    """Runs a subcommand of LightningCLI.

    Args:
        args: The words of the command line, or the values of the options.
    """
    _silence_libraries()
    for name in data.__all__:  # the parser knows classes that have been imported by their bare name
        getattr(data, name)
    TeamCLI(
        Team,
        ImageDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={
            "enable_model_summary": False,  # `DepthReport` has the numbers of parameters
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs", "name": ""},
            },
        },
        parser_class=TeamArgumentParser,
        parser_kwargs={"prog": "teamnet"},
        seed_everything_default=0,
        # The team keeps its own: Lightning's lack the values that the data tells the team.
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        args=args,
    )

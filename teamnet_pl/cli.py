"""The command line: ``teamnet fit``, ``validate``, ``test``, ``predict``."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from teamnet_pl import __version__, cooperation, data
from teamnet_pl.callbacks import BestCheckpoint, DepthReport, LastCheckpoint, PredictionWriter
from teamnet_pl.checkpoints import (
    AtomicCheckpointIO,
    count_weights,
    limit_parameters,
    load_checkpoint,
)
from teamnet_pl.commands import COMMANDS
from teamnet_pl.cooperation import Team
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.errors import TeamNetError
from teamnet_pl.settings import run_settings

_FROM_DATA = ("num_classes", "input_shape")


class SaveRunConfig(SaveConfigCallback):
    """Also has each checkpoint hold the data module and the run's settings, as plain values."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the config, and hands the team the part of it that checkpoints hold."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(pl_module, Team):
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            pl_module.run |= {"data": config["data"], "settings": run_settings(config)}


class TeamArgumentParser(LightningArgumentParser):
    """Says what may have been meant where a name is not known.

    Attributes:
        checkpoint: The file that brought values which the command line does not have.
    """

    checkpoint: str | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with what may have been meant, and exits."""
        unknown = re.findall(r"Option '([\w.]+)'|arguments: --([\w.]+)|path string: (\w+)", message)
        names = [next(filter(None, groups)) for groups in unknown]
        for name in dict.fromkeys(names):
            if close := difflib.get_close_matches(name, set(self._names()), n=3):
                message += f"\n{name!r} is not known. Did you mean {' or '.join(close)}?"
        if self.checkpoint is not None and self.checkpoint not in message:
            message += f"\nThe values that are not given come from {self.checkpoint}."
        super().error(message, ex)

    def _names(self) -> Iterable[str]:
        yield from (option.removeprefix("--") for option in self._option_string_actions)
        for public in (*vars(cooperation).values(), *vars(data).values()):
            if isinstance(public, type):
                yield public.__name__
            if is_dataclass(public):
                yield from (field.name for field in fields(public))


class TeamCLI(LightningCLI):
    """`LightningCLI` for a `Team` on any `ImageDataModule`.

    The dataset tells the team its number of classes and its image shape. A checkpoint brings its
    config along: ``teamnet test --ckpt_path FILE`` needs no other, and what else is given overrides
    it.
    """

    saved: SavedTeam | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, and what the data tells the team."""
        # The first one is the trainer's `checkpoint_callback`.
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(DepthReport, "report")
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
        for name in _FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, after the config of the checkpoint that it names."""
        if args is not None and not isinstance(args, list):
            super().parse_arguments(parser, args)
            return
        try:
            given = sys.argv[1:] if args is None else args
            words, self.saved = _with_checkpointed_config(given)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        if self.saved is not None:
            for one in (parser, *self._subcommand_parsers.values()):
                assert isinstance(one, TeamArgumentParser)
                one.checkpoint = str(self.saved.path)
        self.config = parser.parse_args(words)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's own lets a checkpoint override the command line."""

    def instantiate_classes(self) -> None:
        """Makes team, data and trainer; what the user got wrong is printed without a traceback."""
        # What the user replaces may be of any size, but then the weights do not fit.
        saved = self.saved
        limit = limit_parameters(count_weights(saved.weights), saved.path) if saved else None
        try:
            with limit or nullcontext():
                super().instantiate_classes()
        except MisconfigurationException as error:  # Lightning's, such as of devices
            self._parser(self.subcommand).error(str(error))
        except TypeError as error:
            if not _raised_in(error, "lightning"):
                raise
            self._parser(self.subcommand).error(str(error))
        except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
            # jsonargparse adds all it knows of the types.
            ours: BaseException | None = error
            while ours is not None and not _raised_in(ours, "teamnet_pl"):
                ours = ours.__cause__
            self._parser(self.subcommand).error(str(ours or error))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leaves the checkpoints out where `enable_checkpointing` is off."""
        if config.get("enable_checkpointing") is False:
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Has checkpoints saved whole or not at all, unless the user chose another plugin."""
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; errors of this package are printed without a traceback."""
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:  # which Lightning lets end as if all were well
            sys.exit(128 + signal.SIGTERM)
        except SystemExit as ending:
            if isinstance(ending.__context__, KeyboardInterrupt):
                sys.exit(128 + signal.SIGINT)
            raise
        except MisconfigurationException as error:
            self._parser(subcommand).error(str(error))
        except TeamNetError as error:
            self._parser(subcommand).error(str(error))
        except OSError as error:  # of the disk or the network, wherever
            self._parser(subcommand).error(str(error))
        except ValueError as error:
            # Lightning's are of options that do not fit each other or the data.
            ours = _raised_in(error, "teamnet_pl") or _raised_in(error, "lightning")
            if not ours and not _restores(error):
                raise
            self._parser(subcommand).error(str(error))
        except Exception as error:
            if isinstance(error, RuntimeError) and _raised_in(error, "lightning.pytorch.callbacks"):
                self._parser(subcommand).error(str(error))  # such as of a metric that is not there
            if not _restores(error):
                raise
            path = self.saved.path if self.saved else "The checkpoint"
            self._parser(subcommand).error(
                f"{path} does not hold what a run goes on from, or is damaged "
                f"({type(error).__name__}): {error}"
            )

    def after_fit(self) -> None:
        """Tests the best checkpoint, if asked for."""
        if self._get(self.config, "test_after_fit"):
            # Not by `ckpt_path`: a callback that averages weights would restore the last ones.
            if best := getattr(self.trainer.checkpoint_callback, "best_model_path", ""):
                self.model.load_state_dict(load_checkpoint(best)["state_dict"])
            self.trainer.test(self.model, datamodule=self.datamodule)


def _raised_in(error: BaseException, package: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals["__name__"]).startswith(package)


def _restores(error: BaseException) -> bool:
    """Whether an error was raised while Lightning took a run's state from a checkpoint."""
    modules = {frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "lightning.pytorch.trainer.connectors.checkpoint_connector" in modules


def _with_checkpointed_config(args: list[str]) -> tuple[list[str], SavedTeam | None]:
    """Puts the config of a named checkpoint in front of the subcommand's other options.

    Only the arguments of the team and the data module are taken, after a check of what they name,
    and by a training that goes on the settings that it had.
    """
    given = _given(args)
    path = given.get("ckpt_path")
    if path is None:
        return args, None
    if path in _SEARCHED:
        path = _find_checkpoint(path, given)
        # Not as Lightning looks for it, which starts anew if there is none.
        args = [*args, "--ckpt_path", str(path)]
    trust_import = given.get("trust_import") is True
    saved = SavedTeam.read(str(path), trust_import, given, map_location="meta")
    arguments = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in saved.arguments().items()
        if name not in _FROM_DATA
    }
    config: dict[str, Any] = {"model": arguments}
    stored, named = saved.run.get("data"), given.get("data.class_path")
    # The arguments of another data module have nothing in common with the user's.
    replaced = named is not None and not (
        isinstance(stored, dict) and _same_class(named, stored.get("class_path"))
    )
    if stored is not None and not replaced:
        config["data"] = saved.data()
    subcommand = next((i for i, word in enumerate(args) if word in TeamCLI.subcommands()), 0)
    if args[subcommand] == "fit":
        config |= saved.settings()
    first = 1 + subcommand
    return [*args[:first], "--config", yaml.safe_dump(config), *args[first:]], saved


_SEARCHED = {"best": "best*.ckpt", "last": "last*.ckpt", "hpc": "hpc_ckpt_*.ckpt"}


def _find_checkpoint(kind: str, given: dict[str, Any]) -> Path:
    """The newest checkpoint of a kind in the folder of checkpoints or logs that is in use.

    Raises:
        FileNotFoundError: If there is none.
    """
    if kind == "hpc":  # saved by Lightning, where SLURM stops a job
        folder, pattern = given.get("trainer.default_root_dir"), _SEARCHED[kind]
    elif given.get("checkpoint.dirpath") is not None:
        folder, pattern = given["checkpoint.dirpath"], _SEARCHED[kind]
    else:
        folder = given.get("trainer.logger.init_args.save_dir", "logs")
        pattern = f"**/checkpoints/{_SEARCHED[kind]}"
    place = Path(str(folder or "."))
    # Not `max` by the time alone: on some disks it has few digits.
    paths = sorted(place.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    if not paths:
        raise FileNotFoundError(
            f"There is no checkpoint for --ckpt_path {kind}: no file {pattern} in "
            f"{place.resolve()}. Give the file itself, or leave --ckpt_path out to start anew."
        )
    return paths[-1]


def _same_class(given: object, stored: object) -> bool:
    """Whether a class path that the user gave, which may be the bare name, is the stored one."""
    return given == stored or f"teamnet_pl.data.{given}" == stored


def _given(args: list[str]) -> dict[str, Any]:
    """The values in a command line and its config files, by their dotted name.

    Arguments of the data module are called ``data.init_args.<name>``, as in a config.
    """
    values: dict[str, Any] = {}
    for index, argument in enumerate(args):
        if not argument.startswith("-"):
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        following = args[index + 1 : index + 2]
        if not equals:
            text = following[0] if following and not following[0].startswith("--") else "true"
        try:
            if name in ("config", "c"):
                text = Path(text).read_text() if Path(text).is_file() else text
                values |= _flat(yaml.safe_load(text))
                continue
            value = yaml.safe_load(text)
        except (OSError, yaml.YAMLError):  # which the parser reports
            value = text
        parent, _, field = name.rpartition(".")
        if name == "data" and isinstance(value, str):
            name = "data.class_path"
        elif parent == "data" and field not in ("class_path", "init_args"):
            name = f"data.init_args.{field}"
        values |= _flat(value, name)
    return values


def _flat(value: object, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    values: dict[str, Any] = {}
    for key, inner in value.items():
        values |= _flat(inner, f"{name}.{key}" if name else str(key))
    return values


def run_command(name: str, words: list[str]) -> None:
    """Runs one of our own subcommands."""
    command = COMMANDS[name]
    parser = TeamArgumentParser(prog=f"teamnet {name}", description=_summary(command))
    parser.add_argument("--config", action="config", help="Path to a YAML file of options.")
    parser.add_function_arguments(command, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--json` means `--json true`
            action.nargs, action.const = "?", True
    arguments = parser.instantiate(parser.parse_args(words)).as_dict()
    try:
        command(**{key: value for key, value in arguments.items() if key != "config"})
    except (OSError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))


def _summary(command: Callable[..., None]) -> str:
    return (inspect.getdoc(command) or "").partition("\n")[0]


def main(args: ArgsType = None) -> None:
    """Runs the command line."""
    words = sys.argv[1:] if args is None else args
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there stands in for a library
    if isinstance(words, list) and words and words[0] in COMMANDS:
        run_command(words[0], words[1:])
        return
    own = "".join(f"\n  {name:20}{_summary(command)}" for name, command in COMMANDS.items())
    TeamCLI(
        Team,
        ImageDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs", "name": ""},
            }
        },
        parser_class=TeamArgumentParser,
        parser_kwargs={"epilog": f"besides training:{own}", "version": __version__},
        seed_everything_default=0,
        # The team keeps its own: Lightning's lack what the data tells the team.
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        args=args,
    )

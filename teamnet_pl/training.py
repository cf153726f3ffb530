"""A whole training in one call, of the parts that the command line uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from teamnet_pl.callbacks import BestCheckpoint, Dashboards, DepthReport, LastCheckpoint
from teamnet_pl.callbacks.depth_report import team_report
from teamnet_pl.checkpoint_io import AtomicCheckpointIO
from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.config_files import config_names, config_path
from teamnet_pl.cooperation import LeaderConfig, Team, TeammateConfig
from teamnet_pl.cooperation.report import Report
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy.checkpoint import make_data_module
from teamnet_pl.deploy.export import export_files
from teamnet_pl.deploy.runtime.measuring import profile_teammate
from teamnet_pl.deploy.runtime.predictor import Prediction, Predictor
from teamnet_pl.deploy.runtime.preprocessing import Images
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.elastic import DepthSpec
from teamnet_pl.errors import TeamNetError
from teamnet_pl.settings import run_settings
from teamnet_pl.suggestions import did_you_mean

if TYPE_CHECKING:
    from teamnet_pl.deploy.export.files import FormatName


def save_atomically(trainer: Trainer) -> None:
    """Has checkpoints saved whole or not at all, unless the user chose another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def evaluate_best(trainer: Trainer, team: LightningModule, data: ImageDataModule) -> None:
    """Tests the best weights of a fit; the last ones if none were saved."""
    # Not by `ckpt_path`: a callback that averages weights would restore the last ones.
    if best := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        team.load_state_dict(load_checkpoint(best)["state_dict"])
    trainer.test(team, datamodule=data, verbose=False)


@dataclass(frozen=True)
class TrainedTeam:
    """The result of `train`.

    Attributes:
        checkpoint: The checkpoint with the best weights, for all that takes one.
        report: Accuracy and cost of every depth on the test images; ``report.table()`` is a table
            for rich, ``report.figure()`` a picture.
        team: The team with these weights.
        data: The data it was trained on.
    """

    checkpoint: Path
    report: Report
    team: Team = field(repr=False)
    data: ImageDataModule = field(repr=False)
    _predictors: dict[str, Predictor] = field(default_factory=dict, init=False, repr=False)

    def predict(
        self,
        images: Images,
        *,
        teammate: str = "a",
        budget_ms: float | None = None,
        macs: int | None = None,
        depth: str | None = None,
    ) -> Prediction:
        """Predicts images with one Teammate at the deepest depth that fits.

        Args:
            images: One image or several: files, arrays, PIL images or tensors.
            teammate: Name of the Teammate.
            budget_ms: Milliseconds that the call may take.
            macs: Multiply-accumulates that each image may take.
            depth: Name of the depth.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: As `Predictor.predict` raises it, or if there is no such Teammate.
        """
        if teammate not in self._predictors:
            self._predictors[teammate] = Predictor.from_checkpoint(
                self.checkpoint, teammate, trust_import=True
            )
        predictor = self._predictors[teammate]
        return predictor.predict(images, budget_ms=budget_ms, macs=macs, depth=depth)

    def profile(
        self,
        teammate: str = "a",
        *,
        device: str = "cpu",
        batch_sizes: Sequence[int] = (1, 8),
        runs: int = 50,
    ) -> Profile:
        """Measures latency and memory of each depth of a Teammate on this machine.

        Args:
            teammate: Name of the Teammate.
            device: The device to run it on, such as ``cuda``.
            batch_sizes: Numbers of images that run at once.
            runs: Number of timed runs of each depth and batch size.

        Raises:
            TeamNetError: If there is no such Teammate or device, or a number is not positive.
        """
        return profile_teammate(self.teammate(teammate, device), batch_sizes, runs)

    def export(
        self,
        folder: str | Path,
        formats: Sequence[FormatName],
        teammate: str = "a",
        depths: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Saves a Teammate in files for other programs; see `export_files`.

        Args:
            folder: The folder for the files.
            formats: The formats, such as ``["onnx"]``.
            teammate: Name of the Teammate.
            depths: Depths by their number of blocks; by default all.

        Returns:
            The manifest.

        Raises:
            TeamNetError: If there is no such format, Teammate or depth, or it cannot be exported.
            ModuleNotFoundError: If a library that a format needs is not installed.
        """
        return export_files(self.teammate(teammate), folder, formats, depths, self.data)

    def teammate(self, name: str = "a", device: str = "cpu") -> Teammate:
        """Takes one Teammate alone, an `ElasticNet` in evaluation mode.

        Raises:
            TeamNetError: If there is no such Teammate or device.
        """
        return Teammate.from_checkpoint(self.checkpoint, name, device=device, trust_import=True)


def train(
    data: ImageDataModule | str | Path,
    backbone: str | None = None,
    depths: DepthSpec = 4,
    *,
    options: Mapping[str, Any] | None = None,
    epochs: int = 30,
    folder: str | Path = "logs",
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    **team: Any,
) -> TrainedTeam:
    """Trains a team and tests every depth of the best weights, as ``teamnet fit`` does.

    Args:
        data: A data module; the name of a config with data, such as ``digits`` or
            ``data/cifar10``; or a folder of images, see `ImageFolder`.
        backbone: Name of the backbone of the Leader and both Teammates, such as
            ``torchvision/resnet18``; by default small ResNets, with a Leader twice as wide.
        depths: How many depths a Teammate has, or the number of blocks that each keeps.
        options: Further arguments of the backbone, such as ``{"pretrained": True}``.
        epochs: Number of epochs.
        folder: The folder of runs; this one gets a folder of its own in it.
        seed: Seed of weights, order and augmentation.
        trainer: Further arguments of Lightning's `Trainer`; callbacks are added to those of a run.
        **team: Further arguments of the `Team`, such as ``leader=None`` or ``cooperation=...``.

    Raises:
        TeamNetError: If there is no such data or backbone, an argument does not fit, or no
            validation gave a finite score.

    Examples:
        >>> from teamnet_pl import train
        >>> result = train("digits", depths=3, epochs=20)  # doctest: +SKIP
        >>> result.predict("digit.png", budget_ms=5).names  # doctest: +SKIP
        ['7']
    """
    seed_everything(seed, workers=True, verbose=False)
    module, config = _data_module(data)
    members: dict[str, Any] = {
        name: TeammateConfig(depths=depths, interleaved=name == "b") for name in ("a", "b")
    } | {"leader": LeaderConfig()}
    changes = {"options": dict(options or {})} | ({"name": backbone} if backbone else {})
    members = {name: replace(member, **changes) for name, member in members.items()}
    net = Team(module.num_classes, module.input_shape, **members | team)
    settings: dict[str, Any] = {"max_epochs": epochs, "log_every_n_steps": 10} | dict(trainer or {})
    callbacks = [BestCheckpoint(), LastCheckpoint(), DepthReport(), Dashboards()]
    settings["callbacks"] = [*settings.get("callbacks", []), *callbacks]
    net.run |= {"settings": run_settings({"seed_everything": seed, "trainer": settings})}
    net.run |= {"data": config} if config else {}
    defaults: dict[str, Any] = {"enable_model_summary": False, "logger": CSVLogger(folder, name="")}
    runner = Trainer(**defaults | settings)
    save_atomically(runner)
    runner.fit(net, module)
    best = getattr(runner.checkpoint_callback, "best_model_path", "")
    if not best:
        raise TeamNetError(
            "No checkpoint was saved: there must be a validation with a finite score. Leave "
            "limit_val_batches and enable_checkpointing of the trainer as they are."
        )
    evaluate_best(runner, net, module)
    return TrainedTeam(Path(best), team_report(net, runner, "test"), net.eval(), module)


def _data_module(
    data: ImageDataModule | str | Path,
) -> tuple[ImageDataModule, dict[str, Any] | None]:
    """Makes the data module, with its config if that is known."""
    if isinstance(data, ImageDataModule):
        return data, None
    name = str(data)
    known = [n for n in config_names() if n.startswith("data/") or "/" not in n]
    if isinstance(data, str) and (matches := {name, f"data/{name}"} & set(known)):
        config = yaml.safe_load(config_path(max(matches)).read_text())["data"]
    elif Path(data).is_dir():
        config = yaml.safe_load(config_path("data/image_folder").read_text())["data"]
        config["init_args"]["root"] = str(data)
    else:
        raise TeamNetError(
            f"There is no config of data and no folder {name!r}. {did_you_mean(name, known)} "
            "`teamnet configs` lists the configs."
        )
    return make_data_module(config, name), config

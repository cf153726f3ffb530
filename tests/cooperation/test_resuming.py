"""A resumed run equals the uninterrupted one, bit for bit."""

import copy
import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from torchvision.transforms import v2

from teamnet_pl.callbacks import Dashboards, LastCheckpoint
from teamnet_pl.cooperation import Cooperation, OptimizerConfig, ScheduleConfig
from teamnet_pl.cooperation.optimization import StepSchedule
from tests.helpers.runs import LAST, error_of
from tests.helpers.teams import Recorder, assert_same_state, make_digits, make_team, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class ValueLogger(Logger):
    """Keeps each value by step and name, of which there must be only one."""

    name, version = "rows", 0

    def __init__(self):
        self.values = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            if name not in ("epoch", "train/images_per_second"):
                assert (step, name) not in self.values
                self.values[step, name] = value


class EveryCheckpoint(LastCheckpoint):
    """Keeps every ``last.ckpt``, and the keys of the values logged before."""

    def __init__(self, folder):
        super().__init__(folder, every_n_train_steps=1)
        self.kept = []

    def _save(self, trainer):
        super()._save(trainer)
        path = trainer.default_root_dir + f"/{len(self.kept)}.ckpt"
        (self.dirpath / "last.ckpt").rename(path)
        self.kept.append((path, set(trainer.logger.values)))


class Noise(v2.Transform):
    """Draws from the generators of NumPy and Python, as many augmentations do."""

    def transform(self, inpt, params):
        return v2.functional.to_image(inpt) + np.random.randint(3) + random.randrange(3)  # noqa: NPY002


VIT = {
    "name": "timm/test_vit",
    "options": {"img_size": 8, "patch_size": 4, "drop_rate": 0.2, "drop_path_rate": 0.2},
}
MIXED = {"train_transform": [Noise(), v2.RandomCrop(8, padding=1)], "mixup_alpha": 0.3}
CASES = {
    "plain": {},
    "validation within epochs": {"trainer": {"val_check_interval": 2}},
    "a number of steps": {"trainer": {"max_epochs": -1, "max_steps": 7}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 3}},
    "accumulated by epoch": {"callbacks": lambda: [GradientAccumulationScheduler({1: 2})]},
    "reloaded": {"trainer": {"reload_dataloaders_every_n_epochs": 1}},
    "the same few": {"trainer": {"overfit_batches": 3}, "data": MIXED},
    "dropout": {"team": {"a": VIT, "b": None}},
    "leader first": {"team": {"schedule": ScheduleConfig(leader_alone=0.5, leader_finish=0.5)}},
    "leader ahead, averaged teachers": {
        "team": {
            "schedule": ScheduleConfig(leader_finish=0.6),
            "cooperation": Cooperation(averaged_teachers=0.9),
        }
    },
    "sampled depths": {"team": {"a": {"depths": 5, "sampled_depths": 1, "progressive": 0.5}}},
    "dropped layers": {"team": {"a": {"net": "teamnet_pl.baselines.LayerDropNet"}}},
    "mixed": {"data": MIXED},
    "mixed, two workers": {"data": MIXED | {"num_workers": 2}, "every": 3},
    "EMA": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9)]},
    "SWA": {
        "callbacks": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=2)],
        "trainer": {"max_epochs": 3},
    },
    "batch size searched": {
        "callbacks": lambda: [BatchSizeFinder(max_trials=2, init_val=16)],
        "data": {"batch_size": 8},
    },
}


@pytest.mark.fault(
    "a run that stops within an epoch", "The resumed run reaches the same weights, bit for bit."
)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, case):
    options = CASES[case]

    def fit(seed=0, keep=None, **kwargs):
        team = make_team(seed=seed, **{"b": None} | options.get("team", {}))
        data = make_digits(**{"train_size": 150} | options.get("data", {}))
        pl.seed_everything(seed, verbose=False)
        logger = ValueLogger()
        dashboards = Dashboards()
        callbacks = [dashboards, *options.get("callbacks", list)()]
        trainer = make_trainer(
            tmp_path,
            **{"max_epochs": 2, "limit_train_batches": 4} | options.get("trainer", {}),
            callbacks=callbacks + [keep] * (keep is not None),
            enable_checkpointing=True,
            limit_val_batches=1,
            logger=logger,
        )
        trainer.fit(team, data, weights_only=True, **kwargs)
        state = copy.deepcopy(team.state_dict()), trainer.optimizers[0].state_dict()
        return *state, logger.values, data.batch_size, dashboards.state_dict()

    keep = EveryCheckpoint(tmp_path)
    weights, optimizer, log, batch_size, history = fit(keep=keep)
    assert history["steps"]
    assert len(keep.kept) >= 3
    # All but the last one, which has nothing left to do.
    for path, logged in keep.kept[: -1 : options.get("every", 2)]:
        resumed = fit(seed=1, ckpt_path=path)
        assert_same_state(resumed[0], weights)
        torch.testing.assert_close(resumed[1], optimizer, rtol=0, atol=0)
        assert not logged & resumed[2].keys()
        assert {key: log[key] for key in logged} | resumed[2] == log
        assert resumed[3:] == (batch_size, history)


@pytest.mark.parametrize("finder", [BatchSizeFinder, LearningRateFinder])
def test_a_search_does_not_change_the_length_of_the_schedule(tmp_path, finder):
    recorder = Recorder()
    search = {BatchSizeFinder: {"max_trials": 2, "init_val": 16}, LearningRateFinder: {}}[finder]
    team = make_team(b=None, schedule=ScheduleConfig(warmup=0.0))
    callbacks = [finder(**search), recorder]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=2)
    trainer.fit(team, make_digits(train_size=320))
    steps = trainer.global_step
    rates = recorder.rates[-steps:]
    assert steps == 2 * (320 // trainer.datamodule.batch_size)
    assert rates == sorted(rates, reverse=True)
    # Half a cosine from the peak, in as many steps as there were.
    expected = [team.lr / 2 * (1 + np.cos(np.pi * step / steps)) for step in range(steps)]
    assert rates == pytest.approx(expected)


@pytest.fixture(scope="module")
def stopped(cli, tmp_path_factory):
    """The folder of a run of one epoch, with settings that are not the defaults."""
    folder = tmp_path_factory.mktemp("stopped")
    options = ["--trainer.gradient_clip_val", 0.5, "--trainer.accumulate_grad_batches", 2]
    cli(folder, "fit", *options, "--seed_everything", 7, "--trainer.limit_val_batches", 1)
    return folder


def test_the_settings_of_the_run_are_restored(cli, stopped, tmp_path):
    path = stopped / LAST
    cli(tmp_path, "fit", "--ckpt_path", path, "--trainer.max_epochs", 2, tiny=False)
    text = (tmp_path / "logs/version_0/config.yaml").read_text()
    for line in (
        "seed_everything: 7",
        "  max_epochs: 2",
        "  gradient_clip_val: 0.5",
        "  accumulate_grad_batches: 2",
        "  limit_train_batches: 2",
        "  limit_val_batches: 1",
    ):
        assert line in text.splitlines()
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", ["callbacks", "logger", "profiler", "default_root_dir"])
def test_a_checkpoint_may_not_set_other_trainer_options(cli, stopped, tmp_path, capsys, name):
    content = torch.load(stopped / LAST, weights_only=True)
    content["teamnet"]["settings"]["trainer"][name] = "somewhere"
    torch.save(content, tmp_path / "edited.ckpt")
    error = error_of(capsys, cli, tmp_path, "fit", "--ckpt_path", "edited.ckpt", tiny=False)
    assert f"sets trainer.{name}, which a checkpoint may not set" in error


def test_a_new_learning_rate_and_weight_decay_are_applied(cli, stopped, tmp_path):
    options = ["--model.optimizer.lr", 0.02, "--model.optimizer.weight_decay", 0.003]
    options += ["--model.schedule", json.dumps({"warmup": 0.0, "final": 1.0})]
    options += ["--trainer.max_epochs", 2]
    cli(tmp_path, "fit", "--ckpt_path", stopped / LAST, *options, tiny=False)
    (state,) = torch.load(tmp_path / LAST, weights_only=True)["optimizer_states"]
    assert {group["lr"] for group in state["param_groups"]} == {0.02}
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0, 0.003}


@pytest.mark.fault(
    "a run resumed with incompatible options", "The error names the difference in one sentence."
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.optimizer.name", "adamw"], "another optimizer.name: sgd there, adamw here"),
        (["--model.a.depths", 2], "another a.depths: 3 there, 2 here"),
        (["--model.b", "null"], "another b:"),
        (["--model.optimizer.weight_decay", 0], "resume with the weight_decay"),
        (["--trainer.max_epochs", 0], "trained for 1 epochs, more than the 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_incompatible_runs_are_not_resumed(cli, stopped, tmp_path, capsys, options, message):
    words = ["--ckpt_path", stopped / LAST, *options]
    assert message in error_of(capsys, cli, tmp_path, "fit", *words, tiny=False)


def test_weights_alone_cannot_be_resumed(cli, stopped, tmp_path, capsys):
    content = torch.load(stopped / LAST, weights_only=True)
    del content["optimizer_states"], content["lr_schedulers"], content["callbacks"]
    torch.save(content, tmp_path / "weights.ckpt")
    error = error_of(capsys, cli, tmp_path, "fit", "--ckpt_path", "weights.ckpt", tiny=False)
    assert "holds weights alone" in error


def test_a_new_number_of_steps_is_applied():
    config = OptimizerConfig(lr=0.1)
    optimizer = config.create(torch.nn.Linear(2, 2))
    schedule = StepSchedule(optimizer, ScheduleConfig(warmup=0.0), peak=0.1)
    schedule.start(4)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0.05)
    schedule.start(2 * 4)
    assert schedule.get_last_lr()[0] == pytest.approx(0.05 * (1 + np.cos(np.pi / 4)))


@pytest.mark.posix  # symbolic links
@pytest.mark.parametrize("kind", ["last", "best"])
def test_the_newest_checkpoint_is_found(cli, stopped, tmp_path, monkeypatch, kind):
    (tmp_path / "logs").symlink_to(stopped / "logs")
    options = ["--trainer.logger.init_args.version", f"of {kind}"]
    cli(tmp_path, "fit", "--ckpt_path", kind, "--trainer.max_epochs", 2, *options, tiny=False)
    path = stopped / f"logs/of {kind}/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2


@pytest.mark.fault("no checkpoint to resume from", "The error names the folder that was searched.")
@pytest.mark.parametrize("kind", ["last", "best", "hpc"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_missing_checkpoint_to_resume_from_is_an_error(cli, tmp_path, capsys, kind, kept):
    folder = tmp_path / ("" if kind == "hpc" else "kept" if kept else "logs")
    options = ["--checkpoint.dirpath", "kept"] if kept else []
    error = error_of(capsys, cli, tmp_path, "fit", "--ckpt_path", kind, *options)
    assert f"no checkpoint for --ckpt_path {kind}" in error
    assert f"in {folder.resolve()}." in error
    assert not (tmp_path / "logs").exists()

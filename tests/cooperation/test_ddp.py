"""Two processes equal one process with a batch twice as large."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from teamnet_pl.callbacks import PredictionWriter
from teamnet_pl.cooperation import OptimizerConfig
from tests.helpers.runs import (
    LAST,
    logged_metrics,
    logged_rows,
    of_split,
    read_csv,
    teamnet_command,
)
from tests.helpers.teams import assert_same_state, make_digits, make_team, make_trainer

pytestmark = pytest.mark.slow

BATCH = 16
FILES = ["predictions.csv", "predictions-0.csv", "predictions-1.csv"]


@pytest.fixture(scope="module")
def two_processes(cli, own_nets):
    """Runs the command line in two processes."""

    def run(folder, *args):
        ddp = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", 2]
        path = os.pathsep.join([str(own_nets), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        subprocess.run(teamnet_command(*args, *ddp), cwd=folder, env=env, check=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def runs(cli, two_processes, tmp_path_factory):
    """The folders of a run of one process and of one of two."""
    net = ["--model.{}.name", "own_nets.GroupNormNet", "--model.{}.options", "{{width: 4}}"]
    options = [part.format(member) for member in ("leader", "a", "b") for part in net]
    options += ["--trainer.limit_train_batches", "4", "--test_after_fit", "true"]
    batch = "--data.init_args.batch_size"
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    cli(one, "fit", *options, batch, 2 * BATCH)
    options += ["--model.a.grad_checkpointing", "true"]  # which changes no result
    two_processes(two, "fit", "--config", cli.config, *options, batch, BATCH)
    return one, two


def test_weights_agree(runs):
    one, two = (torch.load(folder / LAST, weights_only=True) for folder in runs)
    assert one["global_step"] == two["global_step"] == 4
    assert_same_state(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)


def test_weights_agree_where_members_take_turns(cli, two_processes, own_nets, tmp_path):
    """The Leader alone, then all, then a finished Leader; depths drawn in each step."""
    net = ["--model.{}.name", "own_nets.GroupNormNet", "--model.{}.options", "{{width: 4}}"]
    options = [part.format(member) for member in ("leader", "a", "b") for part in net]
    options += [
        "--trainer.limit_train_batches",
        "6",
        "--model.cooperation.averaged_teachers",
        "0.9",
    ]
    options += ["--model.schedule.leader_alone", "0.2", "--model.schedule.leader_finish", "0.7"]
    options += ["--model.a.depths", "3", "--model.a.sampled_depths", "0"]
    options += ["--model.b.depths", "3", "--model.b.progressive", "0.9"]
    batch = "--data.init_args.batch_size"
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    cli(one, "fit", *options, batch, 2 * BATCH)
    two_processes(two, "fit", "--config", cli.config, *options, batch, BATCH)
    one, two = (torch.load(folder / LAST, weights_only=True) for folder in (one, two))
    assert one["global_step"] == two["global_step"] == 6
    assert_same_state(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)
    momenta = [states["optimizer_states"][0]["state"] for states in (one, two)]
    assert momenta[0].keys() == momenta[1].keys()


def test_processes_may_drop_other_blocks(cli, two_processes, tmp_path):
    options = ["--config", cli.config, "--model.a.net", "teamnet_pl.baselines.LayerDropNet"]
    options += ["--trainer.limit_train_batches", "6", "--trainer.max_epochs", "1"]
    two_processes(tmp_path, "fit", *options)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 6


def test_metrics_of_every_depth_cover_both_processes(runs):
    logged = [logged_metrics(folder) for folder in runs]
    one, two = (of_split(metrics, "val") | of_split(metrics, "test") for metrics in logged)
    # Four metrics of eight members, the mean, and the disagreement of four shallower depths.
    assert len(one) == 2 * (4 * 8 + 1 + 4)
    assert two == pytest.approx(one, abs=1e-4)


def test_training_logs_means_over_both_processes(runs):
    logged = []
    for folder in runs:
        rows = [row for row in logged_rows(folder) if row["train/loss"]]
        logged.append(
            [
                {
                    name: float(value)
                    for name, value in row.items()
                    if name.startswith("train/") and name != "train/images_per_second"
                }
                for row in rows
            ]
        )
    one, two = logged
    assert len(one) == len(two) == 4
    assert len(one[0]) > 15
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def shortened(data, images):
    """Makes a data module evaluate on its first few images alone."""
    load = data.load_split

    def first(split):
        dataset, labels = load(split)
        if split == "test":
            dataset, labels = Subset(dataset, range(images)), labels[:images]
        return dataset, labels

    data.load_split = first
    setup = data.setup

    def set_up(stage):
        setup(stage)
        if stage in ("fit", "validate"):
            data.val_set.indices = data.val_set.indices[:images]

    data.setup = set_up
    return data


@pytest.mark.parametrize("images", [35, 1])
@pytest.mark.parametrize("split", ["fit", "val", "test"])
def test_each_image_counts_once(tmp_path, images, split):
    """Batches hold 8 images: one process has three and the other two, or one image and none."""
    runs = []
    for options in ({}, {"strategy": "ddp_fork", "devices": 2}):
        team = make_team(a={"depths": 2}, b=None, optimizer=OptimizerConfig(lr=0.0))
        data = shortened(make_digits(batch_size=8), images)
        trainer = make_trainer(
            tmp_path, limit_val_batches=1.0, limit_train_batches=1, precision="64-true", **options
        )
        if split == "fit":  # in which each forward pass waits for the other process
            team.leader.eval()
            for module in team.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0
            trainer.fit(team, data)
        else:
            {"val": trainer.validate, "test": trainer.test}[split](team, data, verbose=False)
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if "train" not in n}
        assert len(metrics) == 4 * 3 + 2
        runs.append(metrics)
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


@pytest.mark.parametrize("images", [35, 1])
def test_each_image_is_predicted_once(tmp_path, images):
    for options in ({}, {"strategy": "ddp_fork", "devices": 2}):
        team = make_team(a={"depths": 2}, b=None)
        data = shortened(make_digits(batch_size=8), images)
        callbacks = [PredictionWriter()]
        trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
        trainer.predict(team, data, return_predictions=False)
    lines = {name: (tmp_path / name).read_text().splitlines() for name in FILES}
    both = [line for name in FILES[1:] for line in lines[name][1:]]
    assert sorted(both) == sorted(lines["predictions.csv"][1:])
    assert len(both) == images


def test_the_report_covers_both_processes(runs):
    paths = [(folder / LAST).with_name("per_depth.json") for folder in runs]
    one, two = (json.loads(path.read_text()) for path in paths)
    assert [row["accuracy"] for row in two] == pytest.approx([row["accuracy"] for row in one])
    assert [row["macs"] for row in two] == [row["macs"] for row in one]


def test_each_process_writes_its_predictions(cli, runs, two_processes, tmp_path):
    checkpoint = shutil.copy(runs[0] / LAST, tmp_path)
    options = ["--ckpt_path", checkpoint, "--trust_import", "true"]  # its nets are a user's own
    cli(tmp_path, "predict", *options, tiny=False)
    two_processes(tmp_path, "predict", *options)

    def rows(name):
        return {int(row["index"]): row for row in read_csv(tmp_path / name)}

    both = rows("predictions-0.csv") | rows("predictions-1.csv")
    assert len(both) == 360
    assert both == rows("predictions.csv")

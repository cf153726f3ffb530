"""Mistakes of users are reported in one sentence, and unusual but valid input works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teamnet_pl import Team, TeamNetError
from teamnet_pl.cli import main
from teamnet_pl.errors import underlying_error
from tests.helpers.runs import BEST, error_of


def with_callback(name, **arguments):
    """The option that adds a callback of Lightning."""
    callback = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}
    return ["--trainer.callbacks", json.dumps([callback])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.accelerator", "gpu"], "gpu"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.strategy", "no_such"], "no_such"),
        (["--trainer.devices", "9x"], "devices"),
        (["--trainer.val_check_interval", "1000"], "val_check_interval"),
        (["--trainer.precision", "12-mixed"], "12-mixed"),
        (["--trainer.max_epochs", "many"], "max_epochs"),
        (with_callback("BackboneFinetuning"), "backbone"),
        (with_callback("EarlyStopping", monitor="val/acc"), "val/acc"),
        (with_callback("NoSuch"), "NoSuch"),
        (["--checkpoint.monitor", "val/acc"], "val/acc"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--data.train_size", "3"], "train_size"),
        (["--data", "NoSuch"], "NoSuch"),
        (["--model.a.depths", "[7,9]"], "9"),
        (["--model.a.blocks", "[nothing*]"], "nothing*"),
        (["--model.label_smoothing", "2"], "label_smoothing"),
        (["--last.every_n_train_steps", "-1"], "every_n_train_steps"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_options_are_reported_in_one_sentence(cli, capsys, tmp_path, words, message):
    if torch.cuda.is_available() and "gpu" in words:
        pytest.skip("there is a GPU")
    assert message in error_of(capsys, cli, tmp_path, "fit", *words)


def test_a_run_without_checkpoints(cli, tmp_path):
    cli(tmp_path, "fit", "--trainer.enable_checkpointing", "false", "--test_after_fit", "true")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("per_depth.json"))


def test_the_learning_rate_finder(cli, tmp_path, monkeypatch):
    """It sets the peak of the schedule."""
    rates = []
    step = Team.on_train_batch_end

    def note(self, *args):
        rates.append((self.trainer.optimizers[0].param_groups[0]["lr"], self.lr))
        step(self, *args)

    options = with_callback("LearningRateFinder", num_training_steps=20, early_stop_threshold=None)
    schedule = ["--model.schedule.warmup", 0, "--model.schedule.final", 1]
    monkeypatch.setattr(Team, "on_train_batch_end", note)
    cli(tmp_path, "fit", *options, *schedule, "--trainer.limit_train_batches", 25)
    peak = rates[-1][1]
    assert peak != 0.1
    assert [rate for rate, _ in rates[-25:]] == pytest.approx([peak] * 25)
    saved = torch.load(tmp_path / BEST, weights_only=True)["hyper_parameters"]
    assert saved["optimizer"]["lr"] == peak


@pytest.mark.fault("missing or misshapen weights in a checkpoint", "One sentence names them.")
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
@pytest.mark.parametrize("damage", ["missing", "shape", "none"])
def test_weights_that_do_not_fit(cli, capsys, checkpoint, tmp_path, command, damage):
    content = torch.load(checkpoint, weights_only=True)
    name = "teammates.a.backbone.fc.weight"
    if damage == "missing":
        del content["state_dict"][name]
    elif damage == "shape":
        content["state_dict"][name] = content["state_dict"][name][:3]
    else:
        del content["state_dict"]
    torch.save(content, tmp_path / "wrong.ckpt")
    error = error_of(capsys, cli, tmp_path, command, "--ckpt_path", "wrong.ckpt", tiny=False)
    assert "wrong.ckpt" in error
    assert damage == "none" or name in error


OWN = """
from torch import nn
from teamnet_pl.data import Digits
from teamnet_pl.backbones import CifarResNet

class Net(CifarResNet):
    def __init__(self, num_classes, in_channels):
        super().__init__(20, num_classes, in_channels, width=4)

class Data(Digits):
    pass
"""


def test_a_users_own_classes_in_the_current_folder(cli, tmp_path):
    """With the console script, whose folder Python puts first on its path."""
    (tmp_path / "my_net.py").write_text(OWN)
    (tmp_path / "timm.py").write_text("raise RuntimeError('it stands in for a library')")
    teamnet = Path(sys.executable).with_name("teamnet")
    words = ["fit", "--config", cli.config, "--data", "my_net.Data", "--trainer.fast_dev_run", 1]
    words += ["--model", json.dumps({"a": {"name": "my_net.Net", "options": {}}})]
    run = subprocess.run(
        [teamnet, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_users_own_classes_in_other_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_other_net.py").write_text(OWN)
    main(["blocks", "--backbone", "my_other_net.Net", "--input_shape", "[1,8,8]"])
    assert "layer3" in capsys.readouterr().out
    assert sys.path[-1] == os.getcwd()


@pytest.mark.fault(
    "a results folder that cannot be written", "The table is printed before the error."
)
def test_a_results_folder_that_cannot_be_written(cli, capsys, checkpoint, tmp_path):
    """There is a folder in place of the file that is written first."""
    content = checkpoint.read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.ckpt").write_bytes(content)
    (tmp_path / "run/.per_depth.json.tmp").mkdir()
    with pytest.raises(SystemExit) as ending:
        cli(tmp_path, "test", "--ckpt_path", "run/best.ckpt", tiny=False)
    printed = capsys.readouterr()
    assert ending.value.code == 2
    assert "Accuracy per depth, test split" in printed.out
    assert "per_depth.json" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["profile", "fit"])
def test_results_that_cannot_be_saved_are_printed(cli, capsys, checkpoint, tmp_path, command):
    """There are files in place of folders, which stops root as well."""
    (tmp_path / "team.ckpt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "profile_a_cpu.json").mkdir()
    (tmp_path / "profile_a_cpu.json/x").touch()
    (tmp_path / "logs").touch()
    words = ["profile", "--runs", 1] if command == "profile" else ["fit", "--trainer.max_epochs", 2]
    with pytest.raises(SystemExit) as ending:
        cli(tmp_path, *words, "--ckpt_path", "team.ckpt", tiny=False)
    printed = capsys.readouterr()
    assert ending.value.code == 2
    assert command == "fit" or "d7" in printed.out
    assert ("profile_a_cpu.json" if command == "profile" else "logs") in printed.err
    assert "Traceback" not in printed.err


def test_the_packages_error_behind_others_is_reported():
    """Other errors may have a cause outside the package, as torchvision's of a failed download."""
    cause, error = (
        TeamNetError("depths must be nested"),
        ValueError("Parser key 'model': and so on"),
    )
    error.__cause__ = cause
    assert underlying_error(error) is cause
    assert underlying_error(ValueError()) is None

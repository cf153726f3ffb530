"""Whatever a user gets wrong is answered in a sentence; what should work works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teamnet_pl import TeamNetError
from teamnet_pl.cli import main
from teamnet_pl.cli.training import underlying_error

BEST = "logs/version_0/checkpoints/best.ckpt"


def finder(name, **arguments):
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
        (finder("BackboneFinetuning"), "backbone"),
        (finder("EarlyStopping", monitor="val/acc"), "val/acc"),
        (finder("NoSuch"), "NoSuch"),
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
def test_wrong_options_are_answered_in_a_sentence(cli, capsys, tmp_path, words, message):
    if torch.cuda.is_available() and "gpu" in words:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ending:
        cli(tmp_path, "fit", *words)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_without_checkpoints(cli, tmp_path):
    cli(tmp_path, "fit", "--trainer.enable_checkpointing", "false", "--test_after_fit", "true")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("per_depth.json"))


def test_the_learning_rate_finder(cli, tmp_path, monkeypatch):
    """It sets the peak of the schedule."""
    from teamnet_pl import Team

    rates = []
    step = Team.on_train_batch_end

    def note(self, *args):
        rates.append((self.trainer.optimizers[0].param_groups[0]["lr"], self.lr))
        step(self, *args)

    options = finder("LearningRateFinder", num_training_steps=20, early_stop_threshold=None)
    schedule = ["--model.schedule.warmup", 0, "--model.schedule.final", 1]
    monkeypatch.setattr(Team, "on_train_batch_end", note)
    cli(tmp_path, "fit", *options, *schedule, "--trainer.limit_train_batches", 25)
    found = rates[-1][1]
    assert found != 0.1
    assert [rate for rate, _ in rates[-25:]] == pytest.approx([found] * 25)
    saved = torch.load(tmp_path / BEST, weights_only=True)["hyper_parameters"]
    assert saved["optimizer"]["lr"] == found


@pytest.mark.fault("weights in a checkpoint are missing or of another shape", "a sentence says so")
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
    with pytest.raises(SystemExit) as ending:
        cli(tmp_path, command, "--ckpt_path", "wrong.ckpt", tiny=False)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert "wrong.ckpt" in error
    assert damage == "none" or name in error
    assert "Traceback" not in error


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


def test_own_classes_in_the_current_folder(cli, tmp_path):
    """By the console script, whose own folder Python puts first on its path."""
    (tmp_path / "my_net.py").write_text(OWN)
    (tmp_path / "timm.py").write_text("raise RuntimeError('it stands in for a library')")
    teamnet = Path(sys.executable).with_name("teamnet")
    words = ["fit", "--config", cli.config, "--data", "my_net.Data", "--trainer.fast_dev_run", 1]
    words += ["--model", json.dumps({"a": {"name": "my_net.Net", "options": {}}})]
    run = subprocess.run(
        [teamnet, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_own_classes_for_our_own_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_other_net.py").write_text(OWN)
    main(["blocks", "--backbone", "my_other_net.Net", "--input_shape", "[1,8,8]"])
    assert "layer3" in capsys.readouterr().out
    assert sys.path[-1] == os.getcwd()


@pytest.mark.fault("the results folder cannot be written", "the table is printed, then the error")
def test_a_results_folder_that_cannot_be_written(cli, capsys, checkpoint, tmp_path):
    """A folder stands where the file should."""
    content = checkpoint.read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.ckpt").write_bytes(content)
    (tmp_path / "run/per_depth.json").mkdir()
    (tmp_path / "run/per_depth.json/x").touch()
    with pytest.raises(SystemExit) as ending:
        cli(tmp_path, "test", "--ckpt_path", "run/best.ckpt", tiny=False)
    printed = capsys.readouterr()
    assert ending.value.code == 2
    assert "Accuracy per depth, test split" in printed.out
    assert "per_depth.json" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["profile", "fit"])
def test_results_that_cannot_be_saved_are_printed(cli, capsys, checkpoint, tmp_path, command):
    """Files stand where folders should, which stops root as well."""
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


def test_the_underlying_error_is_the_one_that_caused_the_others():
    """Others may have a cause that was never raised, such as torchvision's of a failed download."""
    cause, error = (
        TeamNetError("depths must be nested"),
        ValueError("Parser key 'model': and so on"),
    )
    error.__cause__ = cause
    assert underlying_error(error) is cause
    assert underlying_error(ValueError()) is None

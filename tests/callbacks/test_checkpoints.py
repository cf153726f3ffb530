"""Checkpoints of the command line, with real processes, signals and full disks."""

import os
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from teamnet_pl.atomic import atomic_write
from teamnet_pl.callbacks import BestCheckpoint, LastCheckpoint
from teamnet_pl.checkpoint_io import AtomicCheckpointIO
from teamnet_pl.checkpoints import load_checkpoint
from tests.helpers.runs import (
    BEST,
    CHECKPOINTS,
    LAST,
    LOGGED,
    error_of,
    logged_rows,
    teamnet_command,
)
from tests.helpers.teams import make_digits, make_team, make_trainer


def load(path):
    return torch.load(path, weights_only=True)


def scores(folder, version=0):
    """The mean validation accuracies in the CSV log, by step."""
    rows = [row for row in logged_rows(folder, version) if row.get("val/accuracy/mean")]
    return {int(row["step"]): float(row["val/accuracy/mean"]) for row in rows}


@pytest.mark.fault(
    "a plateau after an early best epoch",
    "`last.ckpt` holds the last epoch, `best.ckpt` the best one.",
)
def test_last_holds_the_last_epoch_and_best_the_best_one(cli, tmp_path):
    """The lowest accuracy counts as the best here, and an early epoch has it."""
    options = ["--trainer.max_epochs", 5, "--checkpoint.mode", "min"]
    options += ["--trainer.limit_train_batches", 10]
    cli(tmp_path, "fit", *options)
    last, best = load(tmp_path / LAST), load(tmp_path / BEST)
    assert last["global_step"] == 50
    values = scores(tmp_path)
    assert best["global_step"] == 1 + min(values, key=values.get)
    assert best["global_step"] < 50


def test_best_has_the_weights_that_were_validated(cli, tmp_path):
    """Also if `last` is saved within the epochs."""
    options = ["--trainer.max_epochs", 3, "--last.every_n_train_steps", 1]
    cli(tmp_path, "fit", *options, "--trainer.limit_train_batches", 5)
    best = tmp_path / BEST
    cli(tmp_path, "validate", "--ckpt_path", best, *LOGGED, tiny=False)
    (score,) = scores(tmp_path, version=1).values()
    assert score == pytest.approx(max(scores(tmp_path).values()))


class SaveRecorder(AtomicCheckpointIO):
    """Records the name and the step of each checkpoint that is saved."""

    def __init__(self):
        self.saved = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saved.append((Path(path).name, checkpoint["global_step"]))
        super().save_checkpoint(checkpoint, path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [6, 12]),
        ({"every_n_train_steps": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_n_train_steps": 5}, [5, 6, 10, 12]),
        ({"train_time_interval": timedelta(0)}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ({"train_time_interval": timedelta(hours=1)}, [6, 12]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_last_is_saved_as_often_as_asked(tmp_path, options, expected, accumulate):
    plugin = SaveRecorder()
    trainer = make_trainer(
        tmp_path,
        accumulate_grad_batches=accumulate,
        callbacks=[LastCheckpoint(tmp_path, **options)],
        enable_checkpointing=True,
        limit_train_batches=6 * accumulate,
        limit_val_batches=1,
        max_epochs=2,
        plugins=[plugin],
    )
    trainer.fit(make_team(), make_digits())
    assert plugin.saved == [("last.ckpt", step) for step in expected]


def test_validation_within_the_epoch_comes_before_the_save(tmp_path):
    """Otherwise a resumed run would skip the validation."""
    plugin, order = SaveRecorder(), []

    class Order(BestCheckpoint):
        def on_validation_end(self, trainer, pl_module):
            order.append((trainer.global_step, len(plugin.saved)))

    trainer = make_trainer(
        tmp_path,
        callbacks=[Order(tmp_path), LastCheckpoint(every_n_train_steps=1)],
        enable_checkpointing=True,
        limit_train_batches=4,
        limit_val_batches=1,
        plugins=[plugin],
        val_check_interval=2,
    )
    trainer.fit(make_team(), make_digits())
    assert order == [(2, 1), (4, 3)]
    assert [step for _, step in plugin.saved] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_never_the_best(value, tmp_path):
    class Monitored(BestCheckpoint):
        def _monitor_candidates(self, trainer):
            score = value if trainer.current_epoch != 1 else 0.5
            candidates = super()._monitor_candidates(trainer)
            return candidates | {"val/accuracy/mean": torch.tensor(score)}

    trainer = make_trainer(
        tmp_path,
        callbacks=[Monitored(tmp_path)],
        enable_checkpointing=True,
        limit_train_batches=1,
        limit_val_batches=1,
        max_epochs=3,
    )
    trainer.fit(make_team(), make_digits())
    assert load(tmp_path / "best.ckpt")["epoch"] == 1


@pytest.mark.fault("a second run in the same folder", "The `best.ckpt` of the first run is kept.")
def test_a_later_run_keeps_the_best_of_an_earlier_one(cli, tmp_path):
    options = ["--checkpoint.dirpath", "kept", "--trainer.logger", "false"]
    cli(tmp_path, "fit", *options)
    content = (tmp_path / "kept/best.ckpt").read_bytes()
    with pytest.warns(UserWarning, match="exists and is not empty"):
        cli(tmp_path, "fit", *options, "--seed_everything", 1)
    assert (tmp_path / "kept/best.ckpt").read_bytes() == content
    assert load(tmp_path / "kept/best-v1.ckpt")


def test_a_resumed_run_keeps_the_best_of_the_original_run(cli, tmp_path):
    options = ["--checkpoint.mode", "min", "--trainer.limit_train_batches", 10]
    cli(tmp_path, "fit", *options, "--trainer.max_epochs", 5)
    first, second = tmp_path / CHECKPOINTS, tmp_path / "logs/version_1/checkpoints"
    words = ["--ckpt_path", first / "last.ckpt", "--trainer.max_epochs", 6, *options]
    cli(tmp_path, "fit", *words)
    assert load(second / "last.ckpt")["global_step"] == 60
    assert min(scores(tmp_path, version=1).values()) > min(scores(tmp_path).values())
    assert (second / "best.ckpt").read_bytes() == (first / "best.ckpt").read_bytes()


@pytest.mark.parametrize("option", ["every_n_train_steps", "train_time_interval"])
def test_only_last_is_saved_within_an_epoch(cli, capsys, tmp_path, option):
    error = error_of(capsys, cli, tmp_path, "fit", f"--checkpoint.{option}", 5)
    assert f"last.{option}" in error


# Whole files


@pytest.mark.fault("a kill while a checkpoint is written", "The previous file stays intact.")
@pytest.mark.posix
def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "best.ckpt"
    torch.save({"old": 1}, path)
    script = f"""
import os, signal, torch
from teamnet_pl.checkpoint_io import AtomicCheckpointIO
replace = os.replace
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
AtomicCheckpointIO().save_checkpoint({{"new": torch.zeros(10000)}}, {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert load_checkpoint(path) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 2  # the other one was not renamed
    AtomicCheckpointIO().save_checkpoint({"new": 1}, path)
    assert load_checkpoint(path) == {"new": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]


@pytest.mark.fault(
    "a full disk while a checkpoint is written",
    "The previous file stays intact, and an error reports the failure.",
)
@pytest.mark.posix
def test_a_full_disk(cli, tmp_path):
    """Stands in for a full disk: a limit on the size of files, at which writing fails too."""
    cli(tmp_path, "fit")
    best = tmp_path / BEST
    content = best.read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, resource.RLIM_INFINITY))

    words = ["--trainer.logger", "false", "--report.picture", "false"]
    words += ["--checkpoint.dirpath", best.parent]
    words += ["--ckpt_path", best, "--trainer.max_epochs", 3]
    run = subprocess.run(
        teamnet_command("fit", "--config", cli.config, *words),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
    )
    assert run.returncode == 2
    assert "could not be saved" in run.stderr
    assert "Traceback" not in run.stderr
    assert best.read_bytes() == content
    assert load_checkpoint(best.with_name("last.ckpt"))
    assert not list(best.parent.glob(".*"))


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail():
        with atomic_write(tmp_path / "file") as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


# Signals


def start(cli, folder, *options, launcher=()):
    words = [sys.executable, *launcher, "-m", "teamnet_pl", "fit", "--config", cli.config]
    words += ["--trainer.max_epochs", 1000, "--trainer.limit_train_batches", 1.0, *options]
    with open(folder / "output", "w") as log:
        return subprocess.Popen([*map(str, words)], cwd=folder, stdout=log, stderr=log)


def wait_for(condition, process, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def stopped(cli, folder, number, *options, launcher=(), target=lambda process: process.pid):
    """Sends a signal during training; returns the exit status and the output."""
    process = start(cli, folder, *options, launcher=launcher)
    try:
        wait_for((folder / LAST).exists, process)
        os.kill(target(process), number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    return code, (folder / "output").read_text()


@pytest.mark.fault(
    "SIGTERM or Ctrl-C during training", "`last.ckpt` is saved; the exit status is 143 or 130."
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.posix
def test_a_signal_saves_last(cli, tmp_path, number):
    code, output = stopped(cli, tmp_path, number)
    assert code == 128 + number
    step = int(output.partition("stopped after step ")[2].partition(".")[0])
    assert load(tmp_path / LAST)["global_step"] == step
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM or Ctrl-C during training in two processes",
    "Both stop after the same step; the exit status is 143 or 130.",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.posix
def test_two_processes_stop_together(cli, tmp_path, number):
    options = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    code, output = stopped(cli, tmp_path, number, *options)
    assert code == 128 + number
    step = int(output.partition("stopped after step ")[2].partition(".")[0])
    assert load(tmp_path / LAST)["global_step"] == step


@pytest.mark.slow
@pytest.mark.posix
def test_two_processes_stop_after_a_signal_before_training(cli, tmp_path):
    """A signal to the first process alone, during the sanity check before training."""
    (tmp_path / "early.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Early(Callback):\n"
        "    def on_sanity_check_end(self, trainer, module):\n"
        "        if trainer.is_global_zero:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    options = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    options += ["--trainer.callbacks", '[{"class_path": "early.Early"}]']
    process = start(cli, tmp_path, *options)
    try:
        assert process.wait(timeout=100) == 143
    finally:
        process.kill()
    assert load(tmp_path / LAST)["global_step"] == 1


@pytest.mark.slow
@pytest.mark.posix
def test_torchrun(cli, tmp_path):
    options = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    launcher += ["--master-port", str(LightningEnvironment().main_port), sys.executable]
    code, output = stopped(cli, tmp_path, signal.SIGTERM, *options, launcher=launcher)
    assert code != 0
    step = int(output.partition("stopped after step ")[2].partition(".")[0])
    assert load(tmp_path / LAST)["global_step"] == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.posix
def test_a_signal_outside_training(cli, tmp_path, number):
    """There is nothing to save, but the exit status reports the signal."""
    cli(tmp_path, "fit")
    words = ["test", "--ckpt_path", tmp_path / BEST, "--data.batch_size", 1]
    words += ["--trainer.limit_test_batches", 1.0]
    script = (
        "import os, signal, sys, teamnet_pl.cooperation.team as team\n"
        "step = team.Team.test_step\n"
        "def test_step(self, batch, batch_idx):\n"
        f"    if batch_idx == 3: os.kill(os.getpid(), {int(number)})\n"
        "    return step(self, batch, batch_idx)\n"
        "team.Team.test_step = test_step\n"
        "from teamnet_pl.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], cwd=tmp_path, timeout=120
    )
    assert run.returncode == 128 + number

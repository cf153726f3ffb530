"""Training runs that are killed at random moments and resumed until they are through.

Each run is killed a few times, by SIGKILL or SIGTERM, in a phase chosen at random: at the start,
in a training step, in validation, while a checkpoint is written, at the end. After each kill every
checkpoint that is there has to load, and the next process goes on from the newest ``last.ckpt``.
The end has to be that of a run that nobody killed: weights and optimiser bit for bit, and every row
of its log, each once in the log of a process; where a process goes on, its log replaces the rest of
the one before. A row for each kill is written when its run has ended, and a later call adds to the
file. Linux only. Example::

    python benchmarks/kills.py --kills 200 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from results_file import save_results

from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.cli import main as teamnet

PHASES = ("start", "training", "validation", "saving", "end")
_PIPE = "TEAMNET_KILLS_PIPE"

_RUN = """
data:
  class_path: Digits
  init_args: {batch_size: 32, train_size: 200, num_workers: 0}
model:
  leader: {options: {width: 4}}
  a: {options: {width: 4}, depths: 3}
  b: {options: {width: 4}, depths: 3, interleaved: true}
trainer:
  accelerator: cpu
  devices: 1
  enable_model_summary: false
  enable_progress_bar: false
  limit_train_batches: 4
  limit_val_batches: 2
  log_every_n_steps: 1
  max_epochs: 5
report: {picture: false}
last: {every_n_train_steps: STEPS}
"""
_CALLBACK = "--trainer.callbacks+="
SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "2 workers": ["--data.init_args.num_workers=2"],
    "mixup": ["--data.init_args.mixup_alpha=0.3"],
    "EMA": [
        f"{_CALLBACK}lightning.pytorch.callbacks.EMAWeightAveraging",
        "--trainer.callbacks.decay=0.9",
    ],
    "SWA": [
        f"{_CALLBACK}lightning.pytorch.callbacks.StochasticWeightAveraging",
        "--trainer.callbacks.swa_lrs=0.01",
        "--trainer.callbacks.swa_epoch_start=3",
        "--trainer.callbacks.annealing_epochs=2",
    ],
    "2 processes": ["--trainer.devices=2", "--trainer.strategy=ddp"],
}


class Phases(Callback):
    """Tells the killer how far the run is."""

    def tell(self, phase: str) -> None:
        """Sends a phase, from the first process alone."""
        if _PIPE in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(int(os.environ[_PIPE]), f"{phase}\n".encode())

    def on_train_batch_start(self, *_: Any) -> None:
        """In a training step."""
        self.tell("training")

    def on_validation_batch_start(self, *_: Any) -> None:
        """In validation."""
        self.tell("validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        """Before a checkpoint is written."""
        self.tell("saving")

    def on_train_end(self, *_: Any) -> None:
        """At the end."""
        self.tell("end")


class Run:
    """A process that trains, forked from this one, which has imported everything.

    Args:
        folder: Where it runs; its output goes to ``output.txt`` there.
        words: Its command line.
    """

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.pipe, write = os.pipe()
        self.begin = time.monotonic()
        self.process = os.fork()
        if not self.process:
            self._train(folder, words, write)
        os.close(write)

    def _train(self, folder: Path, words: list[str], pipe: int) -> None:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ[_PIPE] = str(pipe)
            here = str(Path(__file__).parent)
            os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
            # Lightning starts the other processes by this.
            sys.argv = [str(Path(sys.modules["teamnet_pl"].__path__[0]) / "__main__.py"), *words]
            sys.modules["__main__"].__spec__ = None
            os.write(pipe, b"start\n")
            teamnet()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def phases(self) -> Iterator[tuple[str, float]]:
        """The phases that the process tells of, with the seconds since its start."""
        text = ""
        while chunk := os.read(self.pipe, 1):
            text += chunk.decode()
            if text.endswith("\n"):
                yield text.strip(), time.monotonic() - self.begin
                text = ""

    def kill(self, number: int, seconds: float) -> bool:
        """Waits, and then kills the process if it still runs; says whether it did."""
        # A process that ends closes the pipe.
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.pipe], [], [], left)[0] and not os.read(self.pipe, 4096):
                return False
        os.kill(self.process, number)
        return True

    def wait(self, seconds: float = 120) -> int | None:
        """The exit code, negative for a signal; None if it did not end in time."""
        code, deadline = None, time.monotonic() + seconds
        while code is None and time.monotonic() < deadline:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        # Other processes and workers of it that are left.
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if code is None:
            os.waitpid(self.process, 0)
        os.close(self.pipe)
        return code


def rows(folder: Path) -> dict[tuple[int, str], str]:
    """The values in a log by step and name.

    Raises:
        ValueError: If there are two for the same.
    """
    values: dict[tuple[int, str], str] = {}
    path = folder / "metrics.csv"
    if not path.is_file():
        return values
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            step = row.pop("step")
            if step is None or not step.isdecimal() or None in row:
                continue  # cut off by a kill
            for name, value in row.items():
                if value and name != "epoch":
                    key = (int(step), name)
                    if key in values:
                        raise ValueError(f"{path} has {name} of step {step} twice")
                    values[key] = value
    return values


def versions(folder: Path) -> list[Path]:
    """The folders of the processes' logs, in order."""
    found = (folder / "logs").glob("version_*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def newest(folder: Path) -> Path | None:
    """The ``last.ckpt`` of the last process that wrote one."""
    paths = [version / "checkpoints" / "last.ckpt" for version in versions(folder)]
    return next((path for path in reversed(paths) if path.is_file()), None)


def same(value: Any, expected: Any) -> bool:
    """Whether two values of a checkpoint are equal, bit for bit."""
    try:
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def damage(path: Path) -> str | None:
    """Why a checkpoint does not load; None if it does."""
    try:
        load_checkpoint(path)
    except ValueError as error:
        return str(error)
    return None


def differences(folder: Path, reference: Path) -> list[str]:
    """How the end of a run differs from that of the one that was not killed."""
    one, other = (newest(place) for place in (folder, reference))
    assert one is not None
    assert other is not None
    found, expected = load_checkpoint(one), load_checkpoint(other)
    keys = ("state_dict", "optimizer_states", "global_step", "epoch")
    problems = [f"{key} differs" for key in keys if not same(found[key], expected[key])]
    log: dict[tuple[int, str], str] = {}
    for version in versions(folder):
        own = rows(version)
        if own:
            begin = min(step for step, _ in own)
            log = {key: value for key, value in log.items() if key[0] < begin} | own
    complete = rows(versions(reference)[-1])
    if missing := sorted(complete.keys() - log.keys()):
        problems.append(f"the log lacks {len(missing)} values, of step {missing[0][0]} first")
    if wrong := sorted(key for key in complete.keys() & log.keys() if complete[key] != log[key]):
        problems.append(f"the log differs in {len(wrong)} values, at step {wrong[0][0]} first")
    return problems


class Setting:
    """One way to train, and the run that nobody kills.

    Args:
        name: Of `SETTINGS`.
        folder: Where the run goes.
        steps: Steps from checkpoint to checkpoint.
    """

    def __init__(self, name: str, folder: Path, steps: int) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir(parents=True)
        config = folder / "run.yaml"
        config.write_text(_RUN.replace("STEPS", str(steps)))
        self.words = ["fit", "--config", str(config), f"{_CALLBACK}kills.Phases", *SETTINGS[name]]
        run = Run(folder, self.words)
        self.events = list(run.phases())
        if code := run.wait():
            raise RuntimeError(f"{name}: exit code {code}, see {folder / 'output.txt'}")

    def moment(self, draw: random.Random, phase: str) -> tuple[int, float]:
        """After how many of the phase's events to kill, and how much later."""
        at = [number for number, (name, _) in enumerate(self.events) if name == phase]
        event = draw.randrange(len(at))
        following = self.events[at[event] + 1 : at[event] + 2]
        begin = self.events[at[event]][1]
        gap = following[0][1] - begin if following else 0.3
        return event, draw.uniform(0, gap)


def killed_run(
    setting: Setting, folder: Path, draw: random.Random, kills: int
) -> list[dict[str, Any]]:
    """Kills a run so many times, at most, and has it go on to its end; a row for each kill."""
    folder.mkdir(parents=True)
    outcomes: list[dict[str, Any]] = []
    problems: list[str] = []
    while True:
        words = list(setting.words)
        if last := newest(folder):
            words += ["--ckpt_path", str(last)]
        run = Run(folder, words)
        if len(outcomes) < kills:
            phase = draw.choice(PHASES)
            number = draw.choice([signal.SIGKILL, signal.SIGTERM])
            event, delay = setting.moment(draw, phase)
            for name, _ in run.phases():
                event -= name == phase
                if event < 0:
                    break
            killed = run.kill(number, delay)
            code = run.wait()
            row = {"setting": setting.name, "phase": phase, "signal": number.name, "exit": code}
            if killed and code != 0:
                outcomes.append(row)
                if code is None:
                    problems.append("it did not end")
                elif code not in (-number, 128 + number):  # the former while it starts or ends
                    problems.append(f"exit code {code} after {number.name}")
                paths = folder.glob("logs/version_*/checkpoints/*.ckpt")
                problems += filter(None, map(damage, paths))
                continue
        else:
            list(run.phases())
            code = run.wait()
        if code == 0:
            problems += differences(folder, setting.folder)
        else:
            problems.append(f"the resumed run ended with exit code {code}")
        break
    outcome = "; ".join(problems) or "the uninterrupted run"
    return [row | {"outcome": outcome, "run": folder.name} for row in outcomes]


def main() -> None:
    """Kills runs until there are enough kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3, help="from checkpoint to checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    done = json.loads(Path(args.out).read_text())["rows"] if Path(args.out).is_file() else []
    folder = Path(tempfile.mkdtemp(prefix="teamnet-kills-"))
    settings: dict[str, Setting] = {}
    number = 1 + max((row["number"] for row in done), default=-1)
    while len(done) < args.kills:
        name = args.settings[number % len(args.settings)]
        if name not in settings:
            settings[name] = Setting(name, folder / "reference" / name, args.steps)
        draw = random.Random(f"{args.seed} {number}")
        kills = min(args.kills_per_run, args.kills - len(done))
        run = folder / str(number)
        found = killed_run(settings[name], run, draw, kills)
        for row in found:
            row |= {"number": number}
            del row["run"]
        done += found
        save_results(args, done)
        for row in found:
            print(*row.values(), sep=", ", flush=True)
        if all(row["outcome"] == "the uninterrupted run" for row in found):
            shutil.rmtree(run)
        else:
            print(f"see {run}", flush=True)
        number += 1
    failed = [row for row in done if row["outcome"] != "the uninterrupted run"]
    print(f"{len(done)} kills, {len(failed)} of them in runs that did not end as they should")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

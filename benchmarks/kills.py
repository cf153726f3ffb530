"""Training runs that are killed at random moments and resumed until they are complete.

Each run is killed a few times, by SIGKILL or SIGTERM, in a phase chosen at random: at the start,
in a training step, in validation, while a checkpoint is written, at the end. After each kill every
checkpoint must load, and the next process resumes from the newest ``last.ckpt``. The end must be
that of an uninterrupted run: weights and optimizer bit for bit, and every row of its log, once in
the log of each process; from the step where a process resumes, its log replaces the one before. The
rows of a run, one for each kill, are written when it ends. A later call adds to the file. Linux
only. Example::

    python benchmarks/kills.py --kills 200 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import csv
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from harness import TINY, Result, ResultFile, Row, argument_parser, markdown, with_source
from lightning.pytorch import Callback

from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.cli import main as teamnet

PHASES = ("start", "training", "validation", "saving", "end")
_PIPE = "TEAMNET_KILLS_PIPE"

UNINTERRUPTED = "the uninterrupted run"
_RUN = """
data:
  init_args: {train_size: 200, train_transform: null, num_workers: 0}
trainer:
  limit_train_batches: 4
  limit_val_batches: 2
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
    """Tells the killing process the phase of the run."""

    def tell(self, phase: str) -> None:
        """Sends a phase, from the first process only."""
        if _PIPE in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(int(os.environ[_PIPE]), f"{phase}\n".encode())

    def on_train_batch_start(self, *_: Any) -> None:
        """Tells that a training step begins."""
        self.tell("training")

    def on_validation_batch_start(self, *_: Any) -> None:
        """Tells that a validation step begins."""
        self.tell("validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        """Tells that a checkpoint is about to be written."""
        self.tell("saving")

    def on_train_end(self, *_: Any) -> None:
        """Tells that the training ends."""
        self.tell("end")


class Run:
    """A process that trains, forked from this one so that it need not import anything.

    Args:
        folder: Working folder; the output goes to ``output.txt`` in it.
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
            scripts = str(Path(__file__).parent)
            os.environ["PYTHONPATH"] = os.pathsep.join([scripts, os.environ.get("PYTHONPATH", "")])
            # Lightning starts the other processes with this command.
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
        """Yields the phases that the process sends, with the seconds since its start."""
        text = ""
        while chunk := os.read(self.pipe, 1):
            text += chunk.decode()
            if text.endswith("\n"):
                yield text.strip(), time.monotonic() - self.begin
                text = ""

    def kill(self, number: int, seconds: float) -> bool:
        """Waits, and then kills the process if it still runs; returns whether it did."""
        # A process that ends closes the pipe.
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.pipe], [], [], left)[0] and not os.read(self.pipe, 4096):
                return False
        os.kill(self.process, number)
        return True

    def wait(self, seconds: float = 120) -> int | None:
        """Waits for the exit code, negative for a signal; None if it does not end in time."""
        code, deadline = None, time.monotonic() + seconds
        while code is None and time.monotonic() < deadline:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        # Ends its other processes and workers.
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if code is None:
            os.waitpid(self.process, 0)
        os.close(self.pipe)
        return code


def logged_values(folder: Path) -> dict[tuple[int, str], str]:
    """Reads the values in a log by step and name.

    Raises:
        ValueError: If there are two values for one step and name.
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
                if value and name not in ("epoch", "train/images_per_second"):
                    key = (int(step), name)
                    if key in values:
                        raise ValueError(f"{path} has {name} of step {step} twice")
                    values[key] = value
    return values


def versions(folder: Path) -> list[Path]:
    """Lists the folders of the processes' logs, in order."""
    folders = (folder / "logs").glob("version_*")
    return sorted(folders, key=lambda path: int(path.name.removeprefix("version_")))


def newest(folder: Path) -> Path | None:
    """Returns the ``last.ckpt`` of the last process that wrote one."""
    paths = [version / "checkpoints" / "last.ckpt" for version in versions(folder)]
    return next((path for path in reversed(paths) if path.is_file()), None)


def same(value: Any, expected: Any) -> bool:
    """Returns whether two values of a checkpoint are equal, bit for bit."""
    try:
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def damage(path: Path) -> str | None:
    """Returns the reason why a checkpoint does not load; None if it does."""
    try:
        load_checkpoint(path)
    except ValueError as error:
        return str(error)
    return None


def differences(folder: Path, reference: Path) -> list[str]:
    """Lists the differences between the end of a run and that of the uninterrupted run."""
    paths = newest(folder), newest(reference)
    actual, expected = (load_checkpoint(path) for path in paths if path)
    keys = ("state_dict", "optimizer_states", "global_step", "epoch")
    problems = [f"{key} differs" for key in keys if not same(actual[key], expected[key])]
    log: dict[tuple[int, str], str] = {}
    for version in versions(folder):
        if values := logged_values(version):
            begin = min(step for step, _ in values)
            log = {key: value for key, value in log.items() if key[0] < begin} | values
    complete = logged_values(versions(reference)[-1])
    if missing := sorted(complete.keys() - log.keys()):
        problems.append(f"the log lacks {len(missing)} values, of step {missing[0][0]} first")
    if wrong := sorted(key for key in complete.keys() & log.keys() if complete[key] != log[key]):
        problems.append(f"the log differs in {len(wrong)} values, at step {wrong[0][0]} first")
    return problems


class Setting:
    """Options of a training, and its uninterrupted run.

    Args:
        name: Of `SETTINGS`.
        folder: Folder of the run.
        steps: Steps from checkpoint to checkpoint.
    """

    def __init__(self, name: str, folder: Path, steps: int) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir(parents=True)
        config = folder / "run.yaml"
        config.write_text(_RUN.replace("STEPS", str(steps)))
        self.words = ["fit", "--config", str(TINY), "--config", str(config)]
        self.words += [f"{_CALLBACK}kills.Phases", *SETTINGS[name]]
        run = Run(folder, self.words)
        self.events = list(run.phases())
        if code := run.wait():
            raise RuntimeError(f"{name}: exit code {code}, see {folder / 'output.txt'}")

    def moment(self, draw: random.Random, phase: str) -> tuple[int, float]:
        """Draws after how many of the phase's events to kill, and how many seconds later."""
        at = [number for number, (name, _) in enumerate(self.events) if name == phase]
        event = draw.randrange(len(at))
        following = self.events[at[event] + 1 : at[event] + 2]
        begin = self.events[at[event]][1]
        gap = following[0][1] - begin if following else 0.3
        return event, draw.uniform(0, gap)


def measure(setting: Setting, folder: Path, draw: random.Random, kills: int) -> list[Row]:
    """Kills a run up to a number of times, and resumes it to its end; returns a row per kill."""
    folder.mkdir(parents=True)
    rows: list[Row] = []
    problems: list[str] = []
    while True:
        words = list(setting.words)
        if last := newest(folder):
            words += ["--ckpt_path", str(last)]
        run = Run(folder, words)
        if len(rows) < kills:
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
                rows.append(row)
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
    outcome = "; ".join(problems) or UNINTERRUPTED
    return [row | {"outcome": outcome} for row in rows]


def table(result: Result) -> str:
    """Tabulates the kills of each setting, and those whose run ended as the uninterrupted one."""
    kills = Counter(row["setting"] for row in result["rows"])
    same_end = Counter(row["setting"] for row in result["rows"] if row["outcome"] == UNINTERRUPTED)
    rows = [[name, str(count), str(same_end[name])] for name, count in kills.items()]
    return with_source(markdown(["setting", "kills", "same end"], rows), result)


def main() -> None:
    """Kills runs until there are enough kills."""
    parser = argument_parser(__doc__, only=SETTINGS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="from checkpoint to checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    file = ResultFile(args, resume=True, selecting=["only", "kills"])
    folder = Path(tempfile.mkdtemp(prefix="teamnet-kills-"))
    names = args.only or list(SETTINGS)
    settings: dict[str, Setting] = {}
    number = 1 + max((row["number"] for row in file.rows), default=-1)
    while len(file.rows) < args.kills:
        name = names[number % len(names)]
        if name not in settings:
            settings[name] = Setting(name, folder / "reference" / name, args.steps)
        draw = random.Random(f"{args.seed} {number}")
        kills = min(args.kills_per_run, args.kills - len(file.rows))
        run = folder / str(number)
        rows = [row | {"number": number} for row in measure(settings[name], run, draw, kills)]
        file.add(rows)
        for row in rows:
            print(*row.values(), sep=", ", flush=True)
        if all(row["outcome"] == UNINTERRUPTED for row in rows):
            shutil.rmtree(run)
        else:
            print(f"see {run}", flush=True)
        number += 1
    print(table(file.result))
    sys.exit(any(row["outcome"] != UNINTERRUPTED for row in file.rows))


if __name__ == "__main__":
    main()

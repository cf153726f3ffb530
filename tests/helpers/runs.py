"""The command line in small runs: its config, what it logs, its errors, and a user's own code."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from teamnet_pl.cli import main

CHECKPOINTS = "logs/version_0/checkpoints"
BEST = f"{CHECKPOINTS}/best.ckpt"
LAST = f"{CHECKPOINTS}/last.ckpt"
"""Where the first run in a folder puts its checkpoints."""
LOGGED = [
    "--trainer.logger",
    "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: ''}}",
]
"""The options that make an evaluation log like a fit."""


class CommandLine:
    """Runs the command line in a folder, on tiny nets unless told otherwise.

    Attributes:
        config: The config file of the tiny nets.
    """

    def __init__(self, config: Path) -> None:
        self.config = config

    def __call__(self, folder: Path, subcommand: str, *args: object, tiny: bool = True) -> None:
        config = ["--config", str(self.config)] if tiny else []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main([subcommand, *config, *map(str, args)])


def teamnet_command(*args: object) -> list[str]:
    """The command line as the command of a new process."""
    return [sys.executable, "-m", "teamnet_pl", *map(str, args)]


def run_teamnet(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a process in a folder, and waits for its end."""
    return subprocess.run(
        teamnet_command(*args), cwd=folder, capture_output=True, text=True, timeout=300
    )


def error_of(
    capsys: pytest.CaptureFixture[str], run: Callable[..., object], *args: Any, **kwargs: Any
) -> str:
    """Runs a command that fails; returns its error message, without line breaks.

    The exit status must be 2, and there must be neither a traceback nor the usage, which is long.
    """
    with pytest.raises(SystemExit) as ending:
        run(*args, **kwargs)
    assert ending.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in message
    assert "usage:" not in message
    return message


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV file, by column."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logged_rows(folder: Path, version: int | str = "*") -> list[dict[str, str]]:
    """The rows of the CSV log of a run in a folder, by default of its only one."""
    (path,) = folder.glob(f"logs/version_{version}/metrics.csv")
    return read_csv(path)


def logged_metrics(folder: Path, version: int | str = "*") -> dict[str, float]:
    """The last value of each metric in the CSV log of a run."""
    metrics: dict[str, float] = {}
    for row in logged_rows(folder, version):
        metrics |= {name: float(value) for name, value in row.items() if value}
    return metrics


def of_split(metrics: dict[str, float], split: str) -> dict[str, float]:
    """The metrics of one split, such as ``val``."""
    return {name: value for name, value in metrics.items() if name.startswith(f"{split}/")}


def saved_config(folder: Path, version: int | str = "*") -> dict[str, Any]:
    """The config that a run in a folder has saved, by default its only one."""
    (path,) = folder.glob(f"logs/version_{version}/config.yaml")
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


TINY = (Path(__file__).parents[2] / "benchmarks" / "tiny.yaml").read_text()

OWN_NETS = '''
from torch import nn

from teamnet_pl.data import Digits


class FewDigits(Digits):
    """Keeps few images, or all."""

    def __init__(self, keep: int | None = 100, **kwargs):
        super().__init__(train_size=keep, **kwargs)


class PoisonedDigits(Digits):
    """The last process has NaN in an image of its second training batch."""

    batches = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.batches += 1
            if self.batches == 2 and self.trainer.global_rank == self.trainer.world_size - 1:
                images[0] = float("nan")
        return images, labels


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())


class GroupNormNet(nn.Sequential):
    """Without batch norm, so that a batch may be cut in two."""

    def __init__(self, num_classes, in_channels, width=4):
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            *(Residual(width) for _ in range(4)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


def counts_classes(num_classes):
    """Takes no number of channels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


def takes_anything(**kwargs):
    return GroupNormNet(**kwargs)
'''

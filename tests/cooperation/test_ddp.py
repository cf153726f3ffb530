"""Two processes are one with a batch twice as large."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

BATCH = 16


@pytest.fixture(scope="module")
def two_processes(cli, own_nets):
    """Runs the command line in two processes."""

    def run(folder, *args):
        args = [*args, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
        command = [sys.executable, "-m", "teamnet_pl", *args, "--trainer.devices", "2"]
        path = os.pathsep.join([str(own_nets), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        subprocess.run(command, cwd=folder, env=env, check=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def runs(cli, two_processes, tmp_path_factory):
    """Folders of the logs of one process and of two."""
    net = ["--model.{}.name", "own_nets.GroupNormNet", "--model.{}.options", "{{width: 4}}"]
    options = [part.format(member) for member in ("leader", "a", "b") for part in net]
    options += ["--trainer.limit_train_batches", "4", "--test_after_fit", "true"]
    batch = "--data.init_args.batch_size"
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    cli(one, "fit", *options, batch, 2 * BATCH)
    options += ["--model.a.grad_checkpointing", "true"]  # which changes no result
    two_processes(two, "fit", "--config", str(cli.config), *options, batch, str(BATCH))
    return [folder / "logs" / "version_0" for folder in (one, two)]


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_weights_agree(runs, tiny):
    one, two = map(weights, runs)
    assert one["global_step"] == two["global_step"] == 4
    tiny.assert_same_state(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)


def test_metrics_of_every_depth_are_over_both_processes(runs):
    found = []
    for folder in runs:
        metrics = {}
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                metrics |= {name: float(value) for name, value in row.items() if value}
        found.append({n: v for n, v in metrics.items() if n.startswith(("val/", "test/"))})
    assert len(found[0]) == 2 * (4 * 8 + 1)  # four metrics of eight members, and the mean
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_the_report_is_of_both_processes(runs):
    paths = [folder / "checkpoints" / "per_depth.json" for folder in runs]
    one, two = (json.loads(path.read_text()) for path in paths)
    assert [row["accuracy"] for row in two] == pytest.approx([row["accuracy"] for row in one])
    assert [row["macs"] for row in two] == [row["macs"] for row in one]


def test_each_process_writes_what_it_predicts(cli, runs, two_processes, tmp_path):
    checkpoint = shutil.copy(runs[0] / "checkpoints" / "last.ckpt", tmp_path)
    options = ["--ckpt_path", checkpoint, "--trust_import", "true"]  # its nets are of our own
    cli(tmp_path, "predict", *options, tiny=False)
    two_processes(tmp_path, "predict", *options)

    def rows(name):
        with open(tmp_path / name, newline="") as file:
            return {int(row["index"]): row for row in csv.DictReader(file)}

    both = rows("predictions-0.csv") | rows("predictions-1.csv")
    assert len(both) == 360
    assert both == rows("predictions.csv")

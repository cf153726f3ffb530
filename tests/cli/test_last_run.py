"""From a training to its evaluation, profile and predictions, by ``--ckpt_path last-run``."""

import json
import shutil

import pytest
import torch

from teamnet_pl.checkpoints import weights_digest
from teamnet_pl.cli.last_run import last_run
from tests.helpers.runs import BEST, CHECKPOINTS, error_of, run_teamnet

WANDB = (
    "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true, save_dir: w}}"
)
NOISE = ["FLOPs", "Tip", "TPU", "LeafSpec", "deprecated", "weights_only", "workers", "test/loss"]


def files(folder):
    """The files below a folder, without those of W&B itself."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "wandb" not in path.parts and path.parts[0] != "w"}


@pytest.fixture(scope="module")
def walk(cli, tmp_path_factory):
    """A folder in which the commands ran as processes, and what each printed."""
    folder = tmp_path_factory.mktemp("walk")
    commands = {
        "fit": ["fit", "--config", cli.config, "--trainer.limit_train_batches", 20],
        "test": ["test", "--ckpt_path", "last-run"],
        "predict": ["predict", "--ckpt_path", "last-run"],
        "profile": ["profile", "--ckpt_path", "last-run", "--runs", 1, "--batch_sizes", 1],
    }
    printed = {}
    for name, words in commands.items():
        done = run_teamnet(folder, *words)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout + done.stderr
    return folder, printed


def test_each_command_ends_with_the_place_of_its_results(walk):
    folder, printed = walk
    results = {
        "fit": f"{CHECKPOINTS}/best.ckpt",
        "test": f"{CHECKPOINTS}/per_depth.json",
        "predict": f"{CHECKPOINTS}/predictions.csv",
        "profile": f"{CHECKPOINTS}/profile_a_cpu.json",
    }
    for name, path in results.items():
        assert (folder / path).is_file()
        assert any(f" {path}" in line for line in printed[name].splitlines()), printed[name]
    assert "teamnet test --ckpt_path last-run" in printed["fit"]


def test_a_clean_run_prints_no_noise(walk):
    for name, text in walk[1].items():
        assert not [word for word in NOISE if word in text], (name, text)


def test_evaluations_leave_no_folder_of_a_run(walk):
    folder, _ = walk
    assert [path.name for path in folder.glob("logs/*")].count("version_0") == 1
    assert not list(folder.glob("logs/version_1"))
    expected = {"best.ckpt", "last.ckpt", "per_depth.json", "per_depth.png", "predictions.csv"}
    expected |= {"per_depth_val.json", "per_depth_val.png"}
    expected |= {"profile_a_cpu.json", "profile_a_cpu.png"}
    assert {path.name for path in (folder / CHECKPOINTS).iterdir()} == expected
    assert files(folder) == {f"{CHECKPOINTS}/{name}" for name in expected} | {
        "logs/last-run",
        *(f"logs/version_0/{name}" for name in ("config.yaml", "hparams.yaml", "metrics.csv")),
    }


def test_a_profile_has_the_accuracies_of_the_test(walk):
    """Not those of the validation, or of a later test on other data."""
    folder, _ = walk
    rows = json.loads((folder / CHECKPOINTS / "per_depth.json").read_text())
    state = torch.load(folder / BEST, weights_only=True)["state_dict"]
    assert {row["weights"] for row in rows} == {weights_digest(state)}
    assert {row["split"] for row in rows} == {"test"}
    profile = json.loads((folder / CHECKPOINTS / "profile_a_cpu.json").read_text())
    accuracies = {row["depth"]: row["accuracy"] for row in rows if row["net"] == "a"}
    assert {row["depth"]: row["accuracy"] for row in profile["rows"]} == accuracies
    assert profile["split"] == "test"


@pytest.mark.fault(
    "a second evaluation of a checkpoint with another outcome",
    "Its files get another name; the earlier ones are kept.",
)
def test_results_are_never_overwritten(walk, cli, tmp_path):
    """A test on other images, or other predictions, get files of their own."""
    folder = tmp_path / "run"
    shutil.copytree(walk[0], folder)
    earlier = {name: (folder / name).read_bytes() for name in files(folder)}
    for word in ("test", "predict"):
        for _ in range(2):
            limit = [f"--trainer.limit_{word}_batches", 1]
            cli(folder, word, "--ckpt_path", "last-run", *limit, tiny=False)
    assert {name: (folder / name).read_bytes() for name in earlier} == earlier
    new = {"per_depth_2.json", "per_depth_2.png", "predictions_2.csv"}
    assert files(folder) - set(earlier) == {f"{CHECKPOINTS}/{name}" for name in new}


def test_last_run_is_found_in_the_folder_of_any_logger(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    cli(tmp_path, "fit", "--trainer.logger", WANDB)
    (best,) = tmp_path.glob("w/**/best.ckpt")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert last_run().resolve() == best
    cli(tmp_path, "fit", "--checkpoint.dirpath", tmp_path / "kept")
    cli(tmp_path, "test", "--ckpt_path", "last-run", tiny=False)
    assert (tmp_path / "kept/per_depth.json").is_file()


@pytest.mark.parametrize("command", ["test", "fit", "profile"])
def test_no_last_run(cli, capsys, tmp_path, command):
    message = error_of(capsys, cli, tmp_path, command, "--ckpt_path", "last-run", tiny=False)
    assert "No run with a checkpoint was started in" in message
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/last-run").write_text("gone.ckpt")
    message = error_of(capsys, cli, tmp_path, command, "--ckpt_path", "last-run", tiny=False)
    assert "The newest run saved gone.ckpt, which is gone" in message


def test_a_checkpoint_in_a_config(walk, cli, tmp_path):
    (tmp_path / "evaluate.yaml").write_text(f"ckpt_path: {walk[0] / BEST}")
    cli(tmp_path, "validate", "--config", "evaluate.yaml", tiny=False)
    assert not list(tmp_path.glob("logs"))

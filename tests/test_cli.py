import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import teamnet_pl
from teamnet_pl import Team
from teamnet_pl.cli import main
from tests.helpers.runs import (
    BEST,
    CHECKPOINTS,
    LAST,
    LOGGED,
    error_of,
    logged_metrics,
    logged_rows,
    of_split,
    read_csv,
    saved_config,
    teamnet_command,
)
from tests.helpers.teams import make_digits, make_trainer

BATCH_SIZE = "--data.init_args.batch_size"


@pytest.fixture(scope="module")
def fitted(cli, tmp_path_factory):
    """The folder of a run of `fit`, into which other tests write nothing but evaluations."""
    folder = tmp_path_factory.mktemp("fitted")
    cli(folder, "fit", "--test_after_fit", "true")
    return folder


@pytest.fixture(scope="module")
def best(fitted):
    return fitted / BEST


def test_fit_trains_validates_and_tests(fitted, best):
    metrics = logged_metrics(fitted)
    assert metrics["step"] == 2
    team = Team.load_from_checkpoint(best)
    data = make_digits(batch_size=50)
    trainer = make_trainer(fitted, limit_val_batches=1.0)
    for split, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        (expected,) = evaluate(team, data, verbose=False)
        assert of_split(metrics, split) == pytest.approx(expected, abs=1e-5)


def test_fit_keeps_the_best_and_the_last_checkpoint(fitted):
    names = {path.name for path in fitted.glob(f"{CHECKPOINTS}/*.ckpt")}
    assert names == {"best.ckpt", "last.ckpt"}


def test_best_has_the_highest_mean_accuracy(cli, tmp_path):
    cli(tmp_path, "fit", "--trainer.max_epochs", 4, "--trainer.limit_train_batches", 8)
    values = [row["val/accuracy/mean"] for row in logged_rows(tmp_path)]
    accuracies = [float(value) for value in values if value]
    assert len(set(accuracies)) > 1
    best = torch.load(tmp_path / BEST, weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("option", ["--ckpt_path=", "--ckpt_path"])
@pytest.mark.parametrize(("subcommand", "split"), [("test", "test"), ("validate", "val")])
def test_a_checkpoint_alone_is_enough_to_evaluate(
    cli, fitted, best, tmp_path, subcommand, split, option
):
    args = [f"{option}{best}"] if option.endswith("=") else [option, best]
    cli(tmp_path, subcommand, *args, *LOGGED, tiny=False)
    expected = of_split(logged_metrics(fitted), split)
    assert len(expected) > 20
    assert of_split(logged_metrics(tmp_path), split) == pytest.approx(expected, abs=1e-5)
    assert saved_config(tmp_path)["data"]["init_args"]["batch_size"] == 32


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_options_override_the_checkpoints_config(cli, best, tmp_path, first):
    options, checkpoint = [BATCH_SIZE, 48, "--model.label_smoothing", 0.2], ["--ckpt_path", best]
    args = [*options, *checkpoint] if first else [*checkpoint, *options]
    cli(tmp_path, "test", *args, *LOGGED, tiny=False)
    config = saved_config(tmp_path)
    assert config["data"]["init_args"]["batch_size"] == 48
    assert config["model"]["label_smoothing"] == 0.2
    assert config["model"]["a"]["options"] == {"width": 4}


def test_a_checkpoint_restores_null_values(cli, own_nets, tmp_path):
    """Also if their defaults are not null."""
    data = {"class_path": "own_nets.FewDigits", "init_args": {"keep": None}}
    options = ["--data", json.dumps(data), "--model.leader", "null"]
    cli(tmp_path, "fit", *options)
    trusted = ["--trust_import", "true"]  # the data module is not one of this package
    cli(tmp_path, "test", "--ckpt_path", tmp_path / BEST, *trusted, *LOGGED, tiny=False)
    assert saved_config(tmp_path, version=1)["data"]["init_args"]["keep"] is None
    metrics = of_split(logged_metrics(tmp_path, version=1), "test")
    assert "test/accuracy/a/d7" in metrics
    assert "test/accuracy/leader" not in metrics


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_saved_config_is_that_of_the_last_run_in_a_folder(cli, tmp_path):
    for size in (20, 30):
        cli(tmp_path, "fit", "--trainer.logger.init_args.version", 0, BATCH_SIZE, size)
    assert saved_config(tmp_path)["data"]["init_args"]["batch_size"] == 30


def test_predict_writes_the_labels_of_every_member(cli, best, tmp_path):
    cli(tmp_path, "predict", "--ckpt_path", best, tiny=False)
    rows = read_csv(best.with_name("predictions.csv"))
    data = make_digits(batch_size=400)
    data.setup("predict")
    images = data.normalize(next(iter(data.predict_dataloader()))[0])
    team = Team.load_from_checkpoint(best).eval()
    assert [int(row["index"]) for row in rows] == list(range(len(images)))
    with torch.no_grad():
        for member, logits in team(images).items():
            assert [int(row[member]) for row in rows] == logits.argmax(1).tolist()


def test_fit_resumes_with_the_team_and_data_of_the_checkpoint(cli, best, tmp_path):
    trainer = yaml.safe_load(cli.config.read_text())["trainer"] | {"max_epochs": 2}
    last = best.with_name("last.ckpt")
    options = ["--trainer", json.dumps(trainer), "--test_after_fit", "false"]
    cli(tmp_path, "fit", "--ckpt_path", last, *options, tiny=False)
    config = saved_config(tmp_path)
    assert config["model"]["b"]["depths"] == 3
    assert config["data"]["init_args"]["batch_size"] == 32
    assert logged_metrics(tmp_path)["step"] == 3
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["epoch"] == 1
    assert checkpoint["global_step"] == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_fit_resumes_from_the_last_checkpoint_of_its_folder(cli, tmp_path):
    options = ["--checkpoint.dirpath", "kept", "--ckpt_path", "last", "--trainer.max_epochs"]
    cli(tmp_path, "fit", *options[:2], *options[4:], 1)
    cli(tmp_path, "fit", *options, 2)
    assert torch.load(tmp_path / "kept/last.ckpt", weights_only=True)["global_step"] == 4
    assert logged_metrics(tmp_path, version=1)["step"] == 3


def test_a_config_before_the_subcommand(cli, best, tmp_path):
    (tmp_path / "top.yaml").write_text("test: {trainer: {limit_test_batches: 1}}")
    cli(tmp_path, "--config", "top.yaml", "test", "--ckpt_path", best, *LOGGED, tiny=False)
    assert saved_config(tmp_path)["trainer"]["limit_test_batches"] == 1
    assert saved_config(tmp_path)["model"]["a"]["options"] == {"width": 4}
    assert "test/accuracy/mean" in logged_metrics(tmp_path)


def test_a_checkpoint_does_not_need_the_file_of_initial_weights(cli, best, tmp_path):
    start = tmp_path / "start.ckpt"
    start.write_bytes(best.read_bytes())
    options = ["--model.leader.checkpoint", start, "--model.leader.checkpoint_prefix", "leader."]
    cli(tmp_path, "fit", *options)
    start.unlink()
    cli(tmp_path, "test", "--ckpt_path", tmp_path / BEST, *LOGGED, tiny=False)
    assert "test/accuracy/leader" in logged_metrics(tmp_path, version=1)


def test_print_config_round_trips(cli, capsys, tmp_path):
    options = ["--model.a.depths", "[7, 3]", "--model.leader", "null", BATCH_SIZE, 7]
    with pytest.raises(SystemExit):
        cli(tmp_path, "fit", *options, "--print_config")
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["a"]["depths"] == [7, 3]
    assert config["model"]["leader"] is None
    assert config["data"]["init_args"]["batch_size"] == 7
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli(tmp_path, "fit", "--config", "printed.yaml", "--print_config", tiny=False)
    assert yaml.safe_load(capsys.readouterr().out) == config


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_the_config_saved_by_fit_is_accepted(cli, fitted, best, tmp_path, subcommand):
    (path,) = fitted.glob("logs/version_0/config.yaml")
    trained = ["--config", path, "--ckpt_path", best]
    if subcommand == "test":
        cli(tmp_path, subcommand, *trained, "--trainer.limit_test_batches", 1, tiny=False)
        assert "test/accuracy/mean" in logged_metrics(tmp_path)
    elif subcommand == "fit":
        cli(tmp_path, subcommand, "--config", path, tiny=False)
        assert saved_config(tmp_path) == saved_config(fitted)
        logged, expected = logged_metrics(tmp_path), logged_metrics(fitted)
        for metrics in (logged, expected):
            del metrics["train/images_per_second"]
        assert logged == pytest.approx(expected)
    else:
        cli(tmp_path, subcommand, *trained, tiny=False)


def test_configs_compose_and_options_override(cli, capsys, tmp_path):
    (tmp_path / "first.yaml").write_text("model: {b: null, label_smoothing: 0.1}")
    (tmp_path / "second.yaml").write_text("model: {label_smoothing: 0.2, a: {depths: 4}}")
    options = ["--config", "first.yaml", "--config", "second.yaml", "--model.a.depths", 5]
    with pytest.raises(SystemExit):
        cli(tmp_path, "fit", *options, "--print_config")
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["b"] is None
    assert model["label_smoothing"] == 0.2
    assert model["a"]["depths"] == 5
    assert model["a"]["options"] == {"width": 4}


@pytest.mark.fault("a misspelled option or class", "The error suggests what may have been meant.")
@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--data", "Digit"], ["Digits"]),
        (["--data", "teamnet_pl.data.Digit"], ["Digit"]),
        (["--model.lable_smoothing", 0.1], ["model.label_smoothing"]),
        (["--model.a.depth", 3], ["model.a.depths"]),
        (["--model.leader.frozn", "true"], ["frozen"]),
        (["--model.cooperation.peer.wieght", 1], ["model.cooperation.peer.weight"]),
        (["--data.init_args.batchsize", 3], ["batch_size"]),
        (["--data.batchsize", 3], ["batch_size"]),
        (["--trainer.max_epcohs", 3], ["trainer.max_epochs"]),
        (["--model", "{b: {depth: 3}}"], ["depths"]),
        (["--model", "{a: {polcy: round_robin}}"], ["policy"]),
        (["--model", "{cooperation: {peers: {weight: 1}}}"], ["peer"]),
        (["--model.a.name", "cifar/resnet21"], ["cifar/resnet20"]),
        (["--model.a.name", "timm/resnet81"], ["timm/resnet18"]),
        (["--model.b.name", "torchvision/resnet81"], ["torchvision/resnet18"]),
        (["--model.a.name", "no_such_package.Net"], ["no_such_package", "import path"]),
        (["--model.a.name", "cifar"], ["cifar/<model>"]),
        (["--model.a.options", "{widht: 4}"], ["cifar/resnet20", "widht"]),
        (["--model.a.policy", "robin"], ["policy", "round_robin"]),
        (["--model.optimizer.name", "adamv"], ["adamw"]),
        (["--model.optimizer.options", "{moment: 1}"], ["sgd", "moment"]),
        (["--model.a.depths", 20], ["2 to 8 depths"]),
        (["--model.schedule.warmup", 2], ["warmup"]),
        (["--model.cooperation.peer.weight", -1], ["weight", "negative"]),
        (["--model.cooperation.extra", "[{weight: 1, teacher: a, student: c}]"], ["a->c", "b/d7"]),
        (["--model.leader.checkpoint", "none.pt"], ["none.pt"]),
        (["--ckpt_path", "none.ckpt"], ["none.ckpt"]),
        (["--ckpt_path=none.ckpt"], ["none.ckpt"]),
        (["--config", "none.yaml"], ["none.yaml"]),
    ],
    ids=lambda value: str(value[0:2]) if isinstance(value, list) else None,
)
def test_misspelled_names_get_suggestions(cli, capsys, tmp_path, args, meant):
    message = error_of(capsys, cli, tmp_path, "fit", *args)
    for part in meant:
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_data_errors_are_reported_without_a_traceback(cli, capsys, best, tmp_path, subcommand):
    options = ["--data", "CIFAR10", "--data.root", "nowhere", "--data.download", "false"]
    options += ["--ckpt_path", best] if subcommand == "test" else []
    message = error_of(capsys, cli, tmp_path, subcommand, *options)
    assert "CIFAR10 is not in nowhere/cifar-10-batches-py (missing: data_batch_1, " in message


def test_other_errors_keep_their_traceback(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(Team, "configure_optimizers", lambda self: int("none"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli(tmp_path, "fit")


@pytest.mark.fault(
    "a file for `--ckpt_path` that is not a checkpoint",
    "The command reports it in one sentence and exits with status 2.",
)
@pytest.mark.parametrize("subcommand", ["fit", "test"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04broken", b"\x80\x02."])
def test_a_file_that_is_not_a_checkpoint(cli, capsys, tmp_path, content, subcommand):
    (tmp_path / "wrong.ckpt").write_bytes(content)
    message = error_of(capsys, cli, tmp_path, subcommand, "--ckpt_path", "wrong.ckpt")
    assert "wrong.ckpt" in message


@pytest.mark.fault(
    "a file of initial weights that holds none",
    "The command reports it in one sentence and exits with status 2.",
)
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04broken"])
def test_a_file_that_does_not_hold_weights(cli, capsys, tmp_path, content):
    (tmp_path / "wrong.pt").write_bytes(content)
    options = ["--model.leader.checkpoint", "wrong.pt"]
    assert "wrong.pt" in error_of(capsys, cli, tmp_path, "fit", *options)


@pytest.mark.parametrize(
    "content", [torch.zeros(2), {"a": 1}, [1, 2]], ids=["tensor", "dict", "list"]
)
def test_a_file_that_holds_something_else(cli, capsys, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    for options in (["--ckpt_path", "other.pt"], ["--model.leader.checkpoint", "other.pt"]):
        assert "other.pt" in error_of(capsys, cli, tmp_path, "fit", *options)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.fault("a checkpoint with a malicious pickle", "It is refused; nothing is unpickled.")
@pytest.mark.parametrize("place", ["whole", "state_dict", "hyper_parameters", "teamnet"])
@pytest.mark.parametrize(
    "option",
    [("test", "--ckpt_path"), ("fit", "--ckpt_path"), ("fit", "--model.a.checkpoint")],
    ids=" ".join,
)
def test_code_in_a_checkpoint_is_never_run(cli, capsys, best, tmp_path, place, option):
    trap = Malicious(tmp_path / "trapped")
    checkpoint = torch.load(best, weights_only=True)
    torch.save(trap if place == "whole" else checkpoint | {place: trap}, tmp_path / "evil.ckpt")
    subcommand, name = option
    message = error_of(capsys, cli, tmp_path, subcommand, name, "evil.ckpt")
    assert "evil.ckpt" in message
    assert not trap.path.exists()
    # The trap itself works.
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert trap.path.exists()


def test_an_averaged_run_tests_its_averaged_weights(cli, tmp_path):
    ema = {
        "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
        "init_args": {"decay": 0.9},
    }
    options = ["--trainer.callbacks", json.dumps([ema]), "--test_after_fit", "true"]
    cli(tmp_path, "fit", *options, "--trainer.limit_train_batches", 20)
    cli(tmp_path, "test", "--ckpt_path", tmp_path / BEST, *LOGGED, tiny=False)
    expected = of_split(logged_metrics(tmp_path, version=1), "test")
    assert of_split(logged_metrics(tmp_path, version=0), "test") == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.slow
def test_version(capsys, pytestconfig):
    project = (pytestconfig.rootpath / "pyproject.toml").read_text()
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    number = capsys.readouterr().out.split()[-1]
    assert f'\nversion = "{number}"\n' in project
    assert teamnet_pl.__version__ == number


def test_python_m_teamnet_pl_is_teamnet():
    teamnet = Path(sys.executable).with_name("teamnet")
    commands = [teamnet, "--help"], teamnet_command("fit", "--help")
    processes = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for args in commands]
    overview, options = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    for subcommand in ("fit", "validate", "test", "predict"):
        assert subcommand in overview
    for option in ("--model.a", "--model.cooperation", "--data", "--trainer", "--ckpt_path"):
        assert option in options

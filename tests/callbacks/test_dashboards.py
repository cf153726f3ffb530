"""A run on each dashboard, read from the files that its logger writes."""

import hashlib
import json
import os
import re
import sys
from base64 import b64encode

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from wandb.wandb_agent import Agent

from teamnet_pl import Team
from teamnet_pl.callbacks import Dashboards, dashboards
from teamnet_pl.callbacks.boards import Board
from teamnet_pl.cooperation import ScheduleConfig
from teamnet_pl.elastic import cost
from tests.helpers.dashboards import read_wandb
from tests.helpers.runs import error_of
from tests.helpers.teams import extracted_logits, make_digits, make_team, make_trainer

DEPTHS = {"a": ["d7", "d4", "d0"], "b": ["d7", "d5", "d2"]}
MEMBERS = ["leader", *(f"{net}/{depth}" for net in DEPTHS for depth in DEPTHS[net]), "ensemble"]
EPOCHS, STEPS = 3, 6
SHOWN = ["leader", "mean"]
TRAIN = {
    "train/gradient_norm",
    "train/images_per_second",
    "train/learning_rate/leader",
    "train/learning_rate/teammates",
    "train/loss",
    *(f"train/accuracy/{member}" for member in SHOWN),
    "train/ramp/leader",
}


def fit(cli, folder, logger, *options):
    options = [*options, "--test_after_fit", "true", "--trainer.max_epochs", EPOCHS]
    cli(folder, "fit", "--config", f"logger/{logger}", *options)


def offline(patch, folder):
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": folder / "wb"}.items():
        patch.setenv(f"WANDB_{name}", str(value))


@pytest.fixture(scope="module")
def on_wandb(cli, tmp_path_factory):
    """The folder of a run with W&B."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, folder)
        fit(cli, folder, "wandb", "--trainer.logger.init_args.log_model", "true")
        wandb.finish()
        wandb.teardown()  # waits until all is written
    return folder


@pytest.fixture(scope="module")
def run(on_wandb):
    return read_wandb(on_wandb / "logs/wandb")


@pytest.fixture(scope="module")
def checkpoints(on_wandb):
    (folder,) = on_wandb.glob("logs/teamnet/*/checkpoints")
    return folder


@pytest.fixture(scope="module")
def predicted(checkpoints):
    """Images, labels and the label that each member predicts, of both splits."""
    data = make_digits()
    data.setup("fit")
    data.setup("test")
    splits = {}
    for split, name in (("val", "last"), ("test", "best")):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        team = Team.load_from_checkpoint(checkpoints / f"{name}.ckpt")
        logits = extracted_logits(team, data.normalize(images))
        labels_of = {member: values.argmax(1) for member, values in logits.items()}
        deepest = [logits[member].softmax(1) for member in ("a/d7", "b/d7")]
        labels_of["ensemble"] = sum(deepest).argmax(1)
        splits[split] = images, labels, labels_of
    return splits


def series(run, key):
    return [row[key] for row in run.history if key in row]


def test_wandb_has_few_panels_in_each_section(run):
    shown = {f"val/accuracy/{member}" for member in (*SHOWN, "ensemble")}
    sections = run.sections()
    tables = sections.pop("Custom Chart Tables")
    assert sections == {
        "agreement": {f"agreement/{split}" for split in ("val", "test")}
        | {f"agreement/{split}_picture" for split in ("val", "test")},
        "depths": {f"depths/{split}" for split in ("val", "test")}
        | {f"depths/{split}_picture" for split in ("val", "test")},
        "images": {"images/val_need_depth", "images/test_need_depth"},
        "train": TRAIN,
        "val": shown,
    }
    charts = [f"depths/{net}" for net in DEPTHS]
    for split in ("val", "test"):
        charts += [f"depths/{split}_macs/{net}" for net in DEPTHS]
        charts += [f"confusion_{split}/{member}" for member in MEMBERS]
    assert set(run.config["_wandb"]["visualize"]) == set(charts)
    assert tables == {f"Custom Chart Tables/{chart}_table" for chart in charts}


@pytest.mark.parametrize("net", DEPTHS)
def test_wandb_charts_all_depths_over_the_epochs(run, net):
    rows = run.table(f"Custom Chart Tables/depths/{net}_table")
    for depth in DEPTHS[net]:
        points = [(row["step"], row["lineVal"]) for row in rows if row["lineKey"] == depth]
        logged = series(run, f"val/accuracy/{net}/{depth}")
        assert [epoch for epoch, _ in points] == list(range(1, EPOCHS + 1))
        assert [accuracy for _, accuracy in points] == pytest.approx(logged)


@pytest.mark.parametrize("split", ["val", "test"])
def test_wandb_has_accuracy_against_cost_as_data(run, checkpoints, predicted, split):
    _, labels, labels_of = predicted[split]
    team = Team.load_from_checkpoint(checkpoints / "best.ckpt")
    table = {(row["net"], row["depth"]): row for row in run.table(f"depths/{split}")}
    assert len(table) == len(MEMBERS)
    for net, depths in DEPTHS.items():
        points = run.table(f"Custom Chart Tables/depths/{split}_macs/{net}_table")
        for depth, point in zip(depths, points, strict=True):
            price = cost(team.elastic_nets[net].extract(depth), (1, 8, 8))
            accuracy = accuracy_score(labels, labels_of[f"{net}/{depth}"])
            assert (point["MACs"], point["depth"]) == (price.macs, depth)
            assert point["accuracy"] == pytest.approx(accuracy)
            row = table[net, depth]
            assert (row["macs"], row["parameters"]) == (price.macs, price.parameters)
            assert row["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("split", ["val", "test"])
def test_wandb_has_confusion_and_agreement(run, predicted, split):
    _, labels, labels_of = predicted[split]
    agreement = {row["member"]: row for row in run.table(f"agreement/{split}")}
    assert list(agreement) == MEMBERS
    for member in MEMBERS:
        table = run.table(f"Custom Chart Tables/confusion_{split}/{member}_table")
        counts = {(row["Actual"], row["Predicted"]): row["nPredictions"] for row in table}
        expected = confusion_matrix(labels, labels_of[member], labels=range(10))
        assert counts == {(str(i), str(j)): n for (i, j), n in np.ndenumerate(expected)}
        for other in MEMBERS:
            share = accuracy_score(labels_of[member], labels_of[other])
            assert agreement[member][other] == pytest.approx(share)
    assert 1 - agreement["a/d0"]["a/d7"] == pytest.approx(
        series(run, f"{split}/disagreement/a/d0")[-1]
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_wandb_has_images_that_only_deep_depths_get_right(run, predicted, split):
    images, labels, labels_of = predicted[split]
    expected, pixels = [], []
    for net, depths in DEPTHS.items():
        of_depths = [labels_of[f"{net}/{depth}"] for depth in depths]
        hard = (of_depths[0] == labels) & (of_depths[-1] != labels)
        for index in hard.nonzero().flatten().tolist()[:8]:
            right_from = depths[1] if of_depths[1][index] == labels[index] else depths[0]
            said = zip(depths, of_depths, strict=True)
            said = " ".join(f"{depth}:{int(of[index])}" for depth, of in said)
            expected.append((str(int(labels[index])), net, right_from, said))
            pixels.append(images[index, 0].numpy())
    rows = run.table(f"images/{split}_need_depth")
    columns = ("label", "net", "right from", "predicted")
    assert [tuple(row[column] for column in columns) for row in rows] == expected
    assert len(rows) > 3
    for row, image in zip(rows, pixels, strict=True):
        stretched = (image - image.min()) / np.ptp(image.astype(float)) * 255
        with Image.open(run.logged_file(row["image"]["path"])) as shown:
            assert np.abs(np.asarray(shown).astype(float) - stretched).max() <= 1


def test_the_training_is_logged(run):
    assert all(len(series(run, name)) == STEPS for name in TRAIN)
    schedule = ScheduleConfig()
    rates = [0.1 * schedule.factor(step, STEPS) for step in range(STEPS)]
    for net in ("leader", "teammates"):
        assert series(run, f"train/learning_rate/{net}") == pytest.approx(rates)
    assert min(series(run, "train/images_per_second")) > 0
    assert len(set(series(run, "train/gradient_norm"))) == STEPS


def test_wandb_sums_up_the_best_and_keeps_test_apart(run):
    for member in (*MEMBERS, "mean"):
        values = series(run, f"val/accuracy/{member}")
        best = {"max": max(values), "last": values[-1]}
        assert run.summary[f"val/accuracy/{member}"] == pytest.approx(best)
        assert run.summary[f"test/accuracy/{member}"] == series(run, f"test/accuracy/{member}")[-1]
    values = series(run, "val/loss/a/d0")
    assert run.summary["val/loss/a/d0"]["min"] == pytest.approx(min(values), rel=1e-6)


def check_configuration(config):
    """Nested hyper-parameters, or those with names of all parts."""

    def value(name):
        if name in config:
            return config[name]
        inner = config
        for part in name.split("."):
            inner = inner[part]
        return inner

    assert str(value("data.init_args.batch_size")) == "32"
    assert str(value("trainer.max_epochs")) == str(EPOCHS)
    assert str(value("seed_everything")) == "0"
    assert str(value("a.depths")) == "3"
    assert value("versions.torch") == torch.__version__
    price = cost(make_team().elastic_nets["b"].extract("d2"), (1, 8, 8))
    costs = {"macs": price.macs, "parameters": price.parameters}
    if "costs" in config:
        assert config["costs"]["b/d2"] == costs
    else:
        assert {name: int(config[f"costs.b.d2.{name}"]) for name in costs} == costs


def test_the_whole_configuration_is_logged(run):
    check_configuration(run.config)
    assert "model" not in run.config  # which is there by the names of Lightning


@pytest.mark.parametrize(("alias", "epoch"), [("best", None), ("last", EPOCHS - 1)])
def test_wandb_keeps_checkpoints_with_their_accuracies(run, checkpoints, alias, epoch):
    models = [artifact for artifact in run.artifacts if artifact.type == "model"]
    assert len(models) == 2
    (artifact,) = (model for model in models if alias in model.aliases)
    content = (checkpoints / f"{alias}.ckpt").read_bytes()
    (file,) = artifact.manifest.contents
    assert file.path == "model.ckpt"
    assert file.digest == b64encode(hashlib.md5(content).digest()).decode()
    saved = torch.load(checkpoints / f"{alias}.ckpt", weights_only=True)
    metadata = json.loads(artifact.metadata)
    assert (metadata["step"], metadata["epoch"]) == (saved["global_step"], saved["epoch"])
    assert epoch in (None, saved["epoch"])
    rows = metadata["per_depth"]
    assert len(rows) == len(MEMBERS)
    for member, row in zip(MEMBERS, rows, strict=True):
        assert member == (row["net"] if row["depth"] is None else f"{row['net']}/{row['depth']}")
        logged = series(run, f"val/accuracy/{member}")[saved["epoch"]]
        assert row["accuracy"] == pytest.approx(logged)


def test_the_config_is_in_the_folder_of_the_run(on_wandb, checkpoints):
    (path,) = on_wandb.glob("logs/**/config.yaml")
    assert path.parent == checkpoints.parent
    assert yaml.safe_load(path.read_text())["data"]["init_args"]["batch_size"] == 32


@pytest.fixture(scope="module")
def events(cli, tmp_path_factory):
    """The events of a run with TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("tensorboard")
    fit(cli, folder, "tensorboard")
    return EventAccumulator(str(folder / "logs/version_0")).Reload()


def test_tensorboard_has_the_curves_in_one_chart(events):

    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    layout = Layout()
    *_, tensor = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for chart in layout.category[0].chart}
    scalars = events.Tags()["scalars"]
    for net, depths in DEPTHS.items():
        shown = {
            tag for tag in scalars if any(re.search(r, tag) for r in charts[f"Teammate {net}"])
        }
        assert shown == {f"val/accuracy/{net}/{depth}" for depth in depths}
    assert set(scalars) >= TRAIN


def test_tensorboard_has_the_pictures(events):
    expected = set()
    for split in ("val", "test"):
        expected |= {f"confusion/{split}/{member}" for member in MEMBERS}
        expected |= {f"{name}/{split}" for name in ("agreement", "images_that_need_depth")}
        expected |= {f"per_depth/{split}"}
    assert set(events.Tags()["images"]) == expected
    for tag in expected:
        (picture,) = events.Images(tag)
        assert min(picture.width, picture.height) > 200


def test_tensorboard_has_the_configuration_and_a_metric_to_compare_by(events):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    content = HParamsPluginData.FromString(metadata.plugin_data.content)
    start = content.session_start_info.hparams
    values = {
        name.replace("/", "."): getattr(value, value.WhichOneof("kind"))
        for name, value in start.items()
    }
    numbers = {
        k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()
    }
    check_configuration(numbers)
    best = max(event.value for event in events.Scalars("val/accuracy/mean"))
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(best)


@pytest.fixture(scope="module")
def on_mlflow(cli, tmp_path_factory):
    """The folder, the client and the run of a training with MLflow."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    fit(cli, folder, "mlflow", "--trainer.logger.init_args.log_model", "true")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (each for each in client.search_experiments() if each.name == "teamnet")
    (found_run,) = client.search_runs([experiment.experiment_id])
    return folder, client, found_run


def test_mlflow_has_metrics_and_configuration(on_mlflow):
    _, client, mlflow_run = on_mlflow
    assert set(mlflow_run.data.metrics) >= TRAIN
    history = client.get_metric_history(mlflow_run.info.run_id, "val/accuracy/a/d7")
    assert len(history) == EPOCHS
    best = max(point.value for point in history)
    assert mlflow_run.data.metrics["best/accuracy/a/d7"] == pytest.approx(best)
    means = client.get_metric_history(mlflow_run.info.run_id, "val/accuracy/mean")
    best = max(point.value for point in means)
    assert mlflow_run.data.metrics["best/accuracy/mean"] == pytest.approx(best)
    params = mlflow_run.data.params
    check_configuration({name.replace("/", "."): value for name, value in params.items()})


def test_mlflow_keeps_data_pictures_and_checkpoints(on_mlflow, predicted):
    folder, _, mlflow_run = on_mlflow
    artifacts = folder / "mlruns" / mlflow_run.info.experiment_id / mlflow_run.info.run_id
    artifacts = artifacts / "artifacts"
    (checkpoints,) = folder.glob("logs/*/*/checkpoints")
    for alias in ("best", "last"):
        kept = (artifacts / alias / f"{alias}.ckpt").read_bytes()
        assert kept == (checkpoints / f"{alias}.ckpt").read_bytes()
        metadata = json.loads((artifacts / alias / "metadata.json").read_text())
        assert len(metadata["per_depth"]) == len(MEMBERS)
    assert not (artifacts / "best" / "aliases.txt").exists()  # the logger keeps no second copy
    config = (artifacts / "config.yaml").read_bytes()
    assert config == (checkpoints.parent / "config.yaml").read_bytes()
    assert not list(folder.glob("logs/config.yaml"))
    _, labels, labels_of = predicted["test"]  # of a run with the same seed
    confusion = json.loads((artifacts / "confusion/test.json").read_text())
    expected = confusion_matrix(labels, labels_of["a/d4"], labels=range(10))
    assert confusion["a/d4"] == expected.tolist()
    agreement = json.loads((artifacts / "agreement/test.json").read_text())
    share = accuracy_score(labels_of["leader"], labels_of["b/d2"])
    assert agreement["leader"]["b/d2"] == pytest.approx(share)
    rows = json.loads((artifacts / "per_depth/test.json").read_text())
    assert rows[0]["accuracy"] == pytest.approx(accuracy_score(labels, labels_of["leader"]))
    for picture in ("confusion/test/a/d4", "agreement/test", "per_depth/val"):
        with Image.open(artifacts / f"{picture}.png") as image:
            assert min(image.size) > 200


@pytest.mark.slow
def test_the_command_line_of_a_sweep_runs(cli, pytestconfig, tmp_path, monkeypatch):
    """The agent itself builds and starts it, with one value of each parameter."""
    sweep = yaml.safe_load((pytestconfig.rootpath / "configs/sweep.yaml").read_text())
    values = {
        name: parameter["values"][-1] if "values" in parameter else parameter["max"]
        for name, parameter in sweep["parameters"].items()
    }
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards, since the agent sets it
        monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "teamnet"
    command.write_text(SHORT.format(root=pytestconfig.rootpath, python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    agent = Agent(api=None, queue=None, sweep_id="s1")
    agent._sweep_command = sweep["command"]
    args = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "r1", "program": sweep["program"], "args": args})
    agent._run_processes["r1"].wait()
    assert agent._run_processes["r1"].poll() == 0
    logged = read_wandb(tmp_path / "logs/wandb")
    assert series(logged, sweep["metric"]["name"])
    assert logged.config["a"]["depths"] == values["model.a.depths"]
    assert logged.config["optimizer"]["lr"] == values["model.optimizer.lr"]
    weight = logged.config["cooperation"]["leader"]["weight"]
    assert weight == values["model.cooperation.leader.weight"]


SHORT = """#!/bin/sh
cd . && PYTHONPATH={root} exec {python} -m teamnet_pl "$@" --trainer.limit_train_batches=2 \\
    --trainer.max_epochs=1 --trainer.accelerator=cpu --test_after_fit=false
"""
"""The command in place of the installed one, with a short training."""


class KeepingBoard(Board):
    """Writes what it is shown to a file."""

    def show(self, evaluation, step):
        shown = {"agreement": evaluation.agreement, "confusion": evaluation.confusion}
        (self.logger / "shown.json").write_text(json.dumps(shown))


def test_several_processes_show_the_same_as_one(tmp_path, monkeypatch):
    shown = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        monkeypatch.setattr(dashboards, "boards", lambda _, folder=folder: [KeepingBoard(folder)])
        several = {"strategy": "ddp_fork", "devices": 2} if processes > 1 else {}
        trainer = make_trainer(folder, callbacks=[Dashboards()], **several)
        trainer.test(make_team(), make_digits(batch_size=64), verbose=False)
        shown.append(json.loads((folder / "shown.json").read_text()))
    assert sum(map(sum, shown[0]["confusion"]["a/d7"])) == 360
    assert shown[1]["confusion"] == shown[0]["confusion"]
    for member, shares in shown[0]["agreement"].items():
        assert shown[1]["agreement"][member] == pytest.approx(shares)


def test_images_can_be_left_out(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, callbacks=[Dashboards(images=0)], logger=logger)
    trainer.test(make_team(), make_digits(), verbose=False)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
    assert "agreement/test" in tags
    assert "images_that_need_depth/test" not in tags


def test_a_negative_number_of_images_is_refused(cli, capsys, tmp_path):
    message = error_of(capsys, cli, tmp_path, "fit", "--dashboards.images", -1)
    assert "images must be 0 (none) or positive, found -1" in message


def test_other_modules_are_refused(tmp_path):
    class Other(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    trainer = make_trainer(tmp_path, callbacks=[Dashboards()])
    with pytest.raises(TypeError, match="Team, found a Other"):
        trainer.test(Other(), make_digits(), verbose=False)

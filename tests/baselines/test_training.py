"""Baselines train by the command line, as a team does."""

import json
import shutil

import pytest
import torch
import yaml
from torchmetrics.functional.classification import multiclass_accuracy

from teamnet_pl import Team
from tests.helpers.runs import BEST, CHECKPOINTS, error_of, logged_rows, read_csv
from tests.helpers.teams import make_digits, make_team, make_trainer


@pytest.fixture(
    scope="module", params=["apart_distilled", "early_exits", "slimmable", "layer_drop"]
)
def run(request, cli, tmp_path_factory):
    """The folder of a run of a baseline."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--config", f"baseline/{request.param}", "--test_after_fit", "true"]
    cli(folder, "fit", *options, "--trainer.max_epochs", 2)
    return folder


def test_the_report_has_the_accuracy_of_each_extracted_net(run):
    team = Team.load_from_checkpoint(run / BEST).eval()
    net = team.elastic_nets["a"]
    data = make_digits()
    data.prepare_data()
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    rows = json.loads((run / CHECKPOINTS / "per_depth.json").read_text())
    rows = {row["depth"]: row for row in rows if row["net"] == "a"}
    assert list(rows) == ["d7", "d4", "d0"]
    for depth in net.depths:
        plain = net.extract(depth).eval()
        with torch.no_grad():
            logits = torch.cat([plain(images) for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        accuracy = multiclass_accuracy(logits, labels, 10, average="micro")
        assert rows[depth.name]["accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
        parameters = sum(parameter.numel() for parameter in plain.parameters())
        assert rows[depth.name]["parameters"] == parameters


def test_a_run_is_resumed_and_tested_again(run, cli, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    cli(folder, "test", "--ckpt_path", BEST, tiny=False)
    cli(folder, "fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, tiny=False)
    rows = [row for path in folder.glob("logs/*/metrics.csv") for row in read_csv(path)]
    assert max(int(row["epoch"]) for row in rows if row.get("train/loss")) == 2


@pytest.mark.parametrize("command", ["profile", "export", "serve"])
def test_a_baseline_is_not_deployed(run, cli, capsys, tmp_path, command):
    words = [command, "--ckpt_path", run / BEST]
    words += ["--out", "exported", "--formats", "[onnx]"] if command == "export" else []
    message = error_of(capsys, cli, tmp_path, *words, tiny=False)
    assert "Only an elastic net can be deployed, and this Teammate is a teamnet_pl.base" in message
    assert ".extract(depth)" in message


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("teamnet_pl.baselines.NoNet", "cannot be imported"),
        ("torch.nn.Linear", "is not a class derived from"),
        ("torch.manual_seed", "is not a class derived from"),
        ("nonsense", "cannot be imported"),
    ],
)
def test_an_unknown_net_is_refused(cli, capsys, tmp_path, net, message):
    error = error_of(capsys, cli, tmp_path, "fit", "--model.a.net", net)
    assert f"The net {net}" in error.replace("'", "")
    assert message in error


def test_a_net_in_a_checkpoint_needs_trust(run, cli, capsys, tmp_path):
    checkpoint = torch.load(run / BEST, weights_only=True)
    checkpoint["hyper_parameters"]["a"]["net"] = "own_package.Net"
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match=r"net own_package.Net by its import path.*trust_import"):
        Team.load_from_checkpoint(tmp_path / "changed.ckpt")


def test_a_step_runs_the_drawn_depths(cli, tmp_path):
    options = ["--model.a.depths", 6, "--model.a.sampled_depths", 1, "--model.b", "null"]
    options += ["--model.leader", "null", "--trainer.limit_train_batches", 12]
    cli(tmp_path, "fit", *options, "--trainer.max_epochs", 1)
    drawn = []
    for row in logged_rows(tmp_path):
        if row["train/loss"]:
            terms = [name for name in row if name.startswith("train/ce/") and row[name]]
            drawn.append([name.removeprefix("train/ce/a/") for name in terms])
    assert len(drawn) == 12
    assert all({"d7", "d0"} < set(depths) and len(depths) == 3 for depths in drawn)
    assert {depth for depths in drawn for depth in depths} == {"d7", "d6", "d4", "d3", "d1", "d0"}


def test_shallow_depths_join_one_by_one(tmp_path):
    team = make_team(leader=None, b=None, a={"depths": [7, 5, 2, 0], "progressive": 0.75})
    rows = []
    trainer = make_trainer(tmp_path, limit_train_batches=8)
    step = team.training_step

    def kept(batch, batch_idx):
        loss = step(batch, batch_idx)
        rows.append(sorted(name for name in trainer._results if "/ce/a/" in name))
        return loss

    team.training_step = kept
    trainer.fit(team, make_digits())
    assert [len(row) for row in rows] == [1, 2, 2, 3, 3, 4, 4, 4]


def test_the_configs_name_their_source(pytestconfig):
    folder = pytestconfig.rootpath / "teamnet_pl/configs/baseline"
    configs = {path.stem: path.read_text() for path in folder.glob("*.yaml")}
    assert len(configs) >= 10
    for name, text in configs.items():
        assert yaml.safe_load(text)["model"]["b"] is None
        assert "arXiv" in text or name in ("apart", "apart_distilled", "joint"), name

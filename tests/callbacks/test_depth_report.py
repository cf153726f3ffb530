import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl.callbacks import DepthReport
from teamnet_pl.checkpoints import weights_digest
from teamnet_pl.elastic import cost
from tests.helpers.teams import make_digits, make_team, make_trainer

ROWS = [
    ("leader", None),
    ("a", "d7"),
    ("a", "d4"),
    ("a", "d0"),
    ("b", "d7"),
    ("b", "d5"),
    ("b", "d2"),
    ("ensemble", None),
]


def rows_of(folder, split="test"):
    name = {"test": "per_depth.json", "val": "per_depth_val.json"}[split]
    rows = json.loads((folder / name).read_text())
    return {(row["net"], row["depth"]): row for row in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fitted team, its trainer and its folder, which holds the report of the fit."""
    folder = tmp_path_factory.mktemp("run")
    team = make_team()
    keep = ModelCheckpoint(folder / "kept", filename="best", monitor="val/accuracy/mean")
    trainer = make_trainer(
        folder,
        callbacks=[keep, DepthReport()],
        enable_checkpointing=True,
        limit_train_batches=5,
        limit_val_batches=1.0,
        logger=CSVLogger(folder),
    )
    trainer.fit(team, make_digits())
    return team, trainer, folder


def check_rows(rows, team, metrics, split):
    assert list(rows) == ROWS
    for (net, depth), row in rows.items():
        member = net if depth is None else f"{net}/{depth}"
        assert row["split"] == split
        for name in ("accuracy", "accuracy_top5", "loss", "calibration_error"):
            assert row[name] == pytest.approx(float(metrics[f"{split}/{name}/{member}"]))
    costs = {("leader", None): cost(team.leader, (1, 8, 8))}
    for name, net in team.elastic_nets.items():
        for depth in net.depths:
            costs[name, depth.name] = cost(net.extract(depth), (1, 8, 8))
            assert rows[name, depth.name]["blocks_per_stage"] == list(depth.per_stage)
    for key, price in costs.items():
        assert (rows[key]["macs"], rows[key]["parameters"]) == (price.macs, price.parameters)
    for name in ("macs", "parameters"):
        assert rows["ensemble", None][name] == rows["a", "d7"][name] + rows["b", "d7"][name]


def test_fit_reports_beside_its_checkpoints(run):
    team, trainer, folder = run
    assert (folder / "kept" / "best.ckpt").exists()
    check_rows(rows_of(folder / "kept", "val"), team, trainer.callback_metrics, "val")


def test_the_picture_is_an_image(run):
    pixels = imread(run[2] / "kept" / "per_depth_val.png")
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(("stage", "split"), [("test", "test"), ("validate", "val")])
def test_an_evaluation_reports_beside_the_given_checkpoint(run, tmp_path, capsys, stage, split):
    team, trainer, _ = run
    trainer.save_checkpoint(tmp_path / "given" / "best.ckpt")
    evaluator = make_trainer(tmp_path, callbacks=[DepthReport()], limit_val_batches=1.0)
    evaluate = getattr(evaluator, stage)
    evaluate(
        make_team(seed=1), make_digits(), ckpt_path=tmp_path / "given" / "best.ckpt", verbose=False
    )
    rows = rows_of(tmp_path / "given", split)
    check_rows(rows, team, evaluator.callback_metrics, split)
    (picture,) = (tmp_path / "given").glob("per_depth*.png")
    assert imread(picture).size
    printed = capsys.readouterr().out
    assert f"{split} split" in printed
    assert f"Saved as {picture.with_suffix('.json')}" in printed
    for (net, _), row in rows.items():
        assert f"{row['accuracy']:.2%}" in printed, net
        assert f"{row['macs']:,}" in printed


def test_no_result_replaces_another(tmp_path):
    """Neither that of other weights nor that of other data; the same result is kept once."""
    for seed in (0, 1, 1, 2):
        trainer = make_trainer(tmp_path, callbacks=[DepthReport()], limit_test_batches=1)
        trainer.test(make_team(seed=seed), make_digits(), verbose=False)
    names = ["per_depth.json", "per_depth_2.json", "per_depth_3.json"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == names
    weights = [json.loads((tmp_path / name).read_text())[0]["weights"] for name in names]
    assert weights == [weights_digest(make_team(seed=seed).state_dict()) for seed in range(3)]
    assert [path.with_suffix(".png").exists() for path in tmp_path.glob("*.json")] == [True] * 3


def test_without_a_checkpoint_the_report_is_in_the_log_folder(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()], logger=logger)
    trainer.test(make_team(), make_digits(), verbose=False)
    assert list(rows_of(tmp_path / "lightning_logs" / "version_0")) == ROWS


def test_nothing_is_written_in_a_fast_dev_run(tmp_path, capsys):
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()], fast_dev_run=1)
    trainer.fit(make_team(), make_digits())
    assert "Accuracy per depth" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_writes(tmp_path, capsys, monkeypatch):
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()])
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.test(make_team(), make_digits(), verbose=False)
    assert "Accuracy per depth" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("per_depth*"))


def test_a_fit_without_validation_has_nothing_to_report(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()], limit_train_batches=1)
    trainer.fit(make_team(), make_digits())
    assert not list(tmp_path.rglob("per_depth*"))


def test_the_picture_can_be_left_out(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[DepthReport(picture=False)])
    trainer.test(make_team(), make_digits(), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["per_depth.json"]


def test_one_teammate_and_five_classes(tmp_path):
    images = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 5)
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()])
    team = make_team(leader=None, b=None, num_classes=5)
    trainer.test(team, DataLoader(images, batch_size=10), verbose=False)
    rows = rows_of(tmp_path)
    assert list(rows) == ROWS[1:4]
    assert {row["accuracy_top5"] for row in rows.values()} == {None}
    assert imread(tmp_path / "per_depth.png").size


def test_other_modules_are_refused(tmp_path):
    class Other(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    trainer = make_trainer(tmp_path, callbacks=[DepthReport()])
    with pytest.raises(TypeError, match="Team, found a Other"):
        trainer.test(Other(), make_digits(), verbose=False)

"""The one call that trains, against the command line and the parts that it stands for."""

import json

import pytest
import torch
import yaml
from PIL import Image

import teamnet_pl
from teamnet_pl import TeamNetError
from teamnet_pl.cooperation.report import Report
from teamnet_pl.data import Digits, ImageFolder
from teamnet_pl.deploy import Predictor, Teammate
from teamnet_pl.training import _data_module
from tests.helpers.runs import CHECKPOINTS, saved_config
from tests.helpers.teams import make_digits

QUICK = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "limit_train_batches": 20,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_call")
    options = {"options": {"width": 4}, "folder": folder / "logs", "trainer": QUICK}
    return teamnet_pl.train("digits", depths=3, epochs=2, seed=3, **options)


@pytest.fixture(scope="module")
def images():
    data = make_digits(batch_size=60)
    data.setup("test")
    return (255 * next(iter(data.test_dataloader()))[0]).round().byte()


def test_the_report_is_that_of_the_saved_weights(result):
    report = Report.load(result.checkpoint.with_name("per_depth.json"))
    assert result.report.as_json() == report.as_json()
    depths = [(row.net, row.depth) for row in report.rows]
    a, b = ([(name, depth) for depth in names] for name, names in DEPTHS.items())
    assert depths == [("leader", None), *a, *b, ("ensemble", None)]
    assert min(row.accuracy for row in report.of_net("a")) > 0.15


DEPTHS = {"a": ["d7", "d4", "d0"], "b": ["d7", "d5", "d2"]}


def test_the_command_line_goes_on_with_its_checkpoint(result, cli, tmp_path):
    """The same test results, and a training that is resumed with the same team, data and seed."""
    folder = result.checkpoint.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    cli(tmp_path, "test", "--ckpt_path", result.checkpoint, tiny=False)
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == {
        path: content for path, content in before.items() if path.suffix == ".json"
    }
    words = ["--trainer.max_epochs", 3, "--trainer.limit_train_batches", 10]
    cli(tmp_path, "fit", "--ckpt_path", folder / "last.ckpt", *words, tiny=False)
    config = saved_config(tmp_path)
    assert config["seed_everything"] == 3
    assert config["data"]["class_path"] == "teamnet_pl.data.Digits"
    assert config["model"]["b"]["options"] == {"width": 4}
    checkpoint = torch.load(tmp_path / CHECKPOINTS / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2


def test_it_predicts_like_a_predictor(result, images, tmp_path):
    predictor = Predictor.from_checkpoint(result.checkpoint, "b")
    for depth in DEPTHS["b"]:
        expected = predictor.predict(images, depth=depth).probabilities
        actual = result.predict(images, teammate="b", depth=depth)
        torch.testing.assert_close(actual.probabilities, expected)
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "digit.png")
    prediction = result.predict(tmp_path / "digit.png", budget_ms=1e6)
    assert prediction.depth == "d7"
    assert prediction.names == result.predict(images[0]).names


def test_it_profiles_and_exports_with_the_accuracies_of_its_report(result, tmp_path):
    accuracies = {row.depth: row.accuracy for row in result.report.of_net("a")}
    profile = result.profile(batch_sizes=[1], runs=1)
    assert {row.depth: row.accuracy for row in profile.rows} == accuracies
    result.export(tmp_path, ["safetensors"], depths=[4])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [(depth["name"], depth["accuracy"]) for depth in manifest["depths"]] == [
        ("d4", accuracies["d4"])
    ]
    assert (tmp_path / "d4.safetensors").is_file()
    assert isinstance(result.teammate("b"), Teammate)


def test_the_same_seed_gives_the_weights_of_the_command_line(result, cli, tmp_path):
    """`teamnet fit` with the same values."""
    config = {
        "data": {"class_path": "Digits", "init_args": {"batch_size": 64}},
        "model": {
            "leader": {"options": {"width": 4}},
            "a": {"options": {"width": 4}, "depths": 3},
            "b": {"options": {"width": 4}, "depths": 3, "interleaved": True},
        },
        "seed_everything": 3,
        "trainer": QUICK | {"max_epochs": 2, "log_every_n_steps": 10},
    }
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(config))
    cli(tmp_path, "fit", "--config", "same.yaml", tiny=False)
    ours, theirs = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (result.checkpoint, tmp_path / CHECKPOINTS / "best.ckpt")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_data_by_module_name_or_folder(tmp_path):
    digits = Digits()
    assert _data_module(digits) == (digits, None)
    for name in ("digits", "data/digits"):
        module, config = _data_module(name)
        assert isinstance(module, Digits)
        assert config["class_path"] == "teamnet_pl.data.Digits"
    for place in ("train/cat", "train/dog"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    module, config = _data_module(tmp_path)
    assert isinstance(module, ImageFolder)
    assert config["init_args"]["root"] == str(tmp_path)


def test_mistakes_are_reported(tmp_path):
    with pytest.raises(TeamNetError, match=r"no folder 'digist'. Did you mean digits"):
        teamnet_pl.train("digist")
    with pytest.raises(TeamNetError, match=r"no backbone 'resnet50'. Did you mean .*timm/resnet50"):
        teamnet_pl.train("digits", "resnet50")
    with pytest.raises(TeamNetError, match=r"cannot be made: There is no folder .*/train, which"):
        teamnet_pl.train(tmp_path)
    unsaved = QUICK | {"limit_val_batches": 0, "limit_train_batches": 1, "log_every_n_steps": 1}
    options = {"options": {"width": 4}, "folder": tmp_path, "trainer": unsaved}
    with pytest.raises(TeamNetError, match="No checkpoint was saved"):
        teamnet_pl.train("digits", epochs=1, leader=None, b=None, **options)

"""The code of the tutorial and of the guides runs, on tiny nets, and does what the page says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl.deploy import Teammate
from tests.helpers.pages import run_page
from tests.helpers.runs import BEST, saved_config
from tests.helpers.teams import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture
def follow(pytestconfig, tmp_path):
    """Follows a page of the docs in an empty folder; returns the names that its code defines."""
    modules = set(sys.modules)

    def run(page, names=None, parse_only=()):
        path = pytestconfig.rootpath / "docs" / page
        return run_page(path, tmp_path, names or {}, parse_only)

    yield run
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == tmp_path:
            del sys.modules[name]


def test_the_first_page(follow):
    assert [str(depth) for depth in follow("index.md")["net"].depths] == ["d5", "d3", "d2", "d0"]


def test_the_tutorial(follow, tmp_path):
    names = follow("tutorial.md")
    assert {row["net"] for row in names["rows"]} == {"leader", "a", "b", "ensemble"}
    assert isinstance(names["net"], Teammate)
    assert names["prediction"].depth == "d7"
    shallow = names["predictor"].predict(names["images"], budget_ms=0.01)
    assert shallow.depth == "d0"
    assert saved_config(tmp_path, 1)["model"]["leader"] is None
    assert saved_config(tmp_path, 1)["model"]["a"]["depths"] == 6


def test_own_images(follow, tmp_path):
    names = follow("own_images.md", parse_only=["photos.yaml"])
    assert set(names["prediction"].names) <= {"red", "blue"}
    saved = torch.load(tmp_path / BEST, weights_only=True)["teamnet"]
    assert saved["preprocessing"]["input_shape"] == [3, 16, 16]
    assert saved["classes"] == ["blue", "red"]
    configs = map(
        yaml.safe_load, (path.read_text() for path in tmp_path.glob("logs/*/config.yaml"))
    )
    assert "stripes.Stripes" in {config["data"]["class_path"] for config in configs}


def test_own_backbone(follow, tmp_path):
    names = follow("own_backbone.md")
    assert [depth.num_blocks for depth in names["net"].depths] == [4, 2, 0]
    assert [block.name for block in names["net"].blocks] == ["1", "2", "3", "4"]
    started = saved_config(tmp_path, 1)["model"]["a"]
    assert (started["name"], started["checkpoint"]) == ("my_net.MyNet", "my_net.pt")
    logits = torch.ones(2, 3)
    assert names["Logits"](lambda images: {"logits": images})(logits) is logits


def test_sweeps(follow, tmp_path):
    names = follow("sweeps.md")
    assert set(names["scores"]) == {0.05, 0.1}
    for lr, score in names["scores"].items():
        rows = json.loads((tmp_path / f"search/lr-{lr}/per_depth_val.json").read_text())
        teammates = [row["accuracy"] for row in rows if row["net"] in ("a", "b")]
        assert len(teammates) == 8
        assert score == pytest.approx(np.mean(teammates))
        assert {row["split"] for row in rows} == {"val"}


def test_several_devices(follow, tmp_path):
    follow("several_devices.md", parse_only=["recipe/imagenet"])
    assert saved_config(tmp_path, 1)["data"]["init_args"]["batch_size"] == 32
    assert (tmp_path / "logs/version_2").is_dir()


def test_migrate(follow, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    names = follow("migrate.md", {"train_loader": loader, "val_loader": loader})
    for name in ("Classifier", "ElasticClassifier", "TaughtClassifier"):
        module = names[name]()
        before = [parameter.clone() for parameter in module.parameters()]
        make_trainer(tmp_path).fit(module, loader, loader)
        for old, new in zip(before, module.parameters(), strict=True):
            assert not torch.equal(old, new)
    assert "net.backbone.conv1.weight" in names["ElasticClassifier"]().state_dict()
    assert names["trainer"].callback_metrics["val/accuracy/mean"] >= 0
    assert names["team"].leader_frozen


def test_export(follow, tmp_path):
    pytest.importorskip("onnxscript")
    names = follow("export.md")
    teammate = Teammate.from_checkpoint(tmp_path / BEST, "a")
    for depth, logits in names["logits"].items():
        net = teammate.extract(depth).eval()
        with torch.no_grad():
            expected = net(torch.from_numpy(names["batch"]))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    kept = names["plain"].state_dict()
    assert kept.keys() == names["teammate"].extract("d6").state_dict().keys()
    assert (tmp_path / "exported_b/d6.safetensors").is_file()

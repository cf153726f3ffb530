"""A net with infinite or NaN weights is not deployed."""

import shutil

import pytest
import torch

from teamnet_pl import ElasticNet
from teamnet_pl.cli import main
from teamnet_pl.deploy import Predictor, Preprocessing, Teammate, export_files
from tests.helpers.runs import error_of
from tests.helpers.teams import make_team

NAME = "backbone.fc.weight"
MESSAGE = "has weights that are infinite or NaN: 2 of .* values of (teammates.a.)?" + NAME


@pytest.fixture(scope="module")
def poisoned(checkpoint, tmp_path_factory):
    """A checkpoint with two such weights."""
    path = shutil.copy(checkpoint, tmp_path_factory.mktemp("poisoned"))
    content = torch.load(path, weights_only=True)
    weight = content["state_dict"][f"teammates.a.{NAME}"]
    weight[0, 1], weight[2, 3] = torch.nan, -torch.inf
    torch.save(content, path)
    return path


def poison(net):
    with torch.no_grad():
        net.backbone.fc.weight[0, :2] = torch.nan
    return net


@pytest.mark.parametrize("load", [Teammate.from_checkpoint, Predictor.from_checkpoint])
def test_loading_a_checkpoint(poisoned, load):
    with pytest.raises(ValueError, match=MESSAGE):
        load(poisoned)


def test_the_other_teammate_is_not_affected(poisoned):
    assert Teammate.from_checkpoint(poisoned, "b").backbone.fc.weight.isfinite().all()


def test_loading_from_the_hub(checkpoint, tmp_path):
    poison(Teammate.from_checkpoint(checkpoint)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=MESSAGE):
        Teammate.from_pretrained(tmp_path)


def test_exporting_files(checkpoint, tmp_path):
    net = poison(Teammate.from_checkpoint(checkpoint))
    with pytest.raises(ValueError, match=MESSAGE):
        export_files(net, tmp_path / "out", ["safetensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "NaN weights", "`profile`, `serve` and `export` refuse the net and name the tensor."
)
@pytest.mark.parametrize(
    "words", [["profile"], ["serve"], ["export", "--out", "out", "--formats", "[safetensors]"]]
)
def test_commands(poisoned, words, capsys):
    assert NAME in error_of(capsys, main, [*words, "--ckpt_path", str(poisoned)])


def test_outputs_that_overflow():
    net = make_team().teammates["a"]
    assert isinstance(net, ElasticNet)
    with torch.no_grad():
        net.backbone.fc.weight.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="The net's output at d7 is not finite, though"):
        Predictor(net, Preprocessing((1, 8, 8), [0.5], [0.5]))

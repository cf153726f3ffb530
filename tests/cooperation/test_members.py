"""Members as modules, and teams of more than two Teammates."""

import json
from itertools import permutations

import pytest
import torch
from torch import nn

from teamnet_pl import ElasticNet, Team, TeammateConfig
from teamnet_pl.backbones import CifarResNet
from teamnet_pl.cooperation import Cooperation, PeerEdge, SubNetworkEdge
from teamnet_pl.deploy import Predictor, Teammate
from teamnet_pl.errors import TeamNetError
from tests.helpers.runs import BEST, LAST, error_of, logged_rows
from tests.helpers.teams import (
    TINY_RESNET,
    assert_same_state,
    extracted_logits,
    fit_and_save,
    make_digits,
    make_team,
    make_trainer,
    snapshot,
)

THIRD = {"c": TINY_RESNET | {"depths": [7, 1]}}


def resnet():
    return CifarResNet(20, 10, 1, 4)


def team_of_modules(**changes) -> Team:
    """The team of `make_team`, of modules; some of them may be given."""
    torch.manual_seed(0)
    members = {
        "leader": resnet(),
        "a": ElasticNet(resnet(), (1, 8, 8), depths=3),
        "b": ElasticNet(resnet(), (1, 8, 8), depths=3, interleaved=True),
    }
    return Team(10, (1, 8, 8), **members | changes)


def test_a_team_of_modules_trains_like_one_of_configs(tmp_path):
    states = []
    for team in (team_of_modules(), make_team()):
        make_trainer(tmp_path, limit_train_batches=3).fit(team, make_digits())
        states.append(snapshot(team))
    assert_same_state(*states)


def test_a_backbone_becomes_elastic():
    team = team_of_modules(b=resnet())
    assert isinstance(team.elastic_nets["b"], ElasticNet)
    assert len(team.elastic_nets["b"].depths) == 4
    logits = team(torch.randn(2, 1, 8, 8))
    assert set(logits) == set(team.members())


def test_a_leader_without_gradients_only_teaches():
    leader = resnet().requires_grad_(False)
    team = team_of_modules(leader=leader)
    assert team.leader_frozen
    assert not team.train().leader.training
    terms = team.criterion.terms(team(torch.randn(4, 1, 8, 8)), torch.arange(4))
    assert "leader" not in terms.labels
    assert "leader->a/d7" in terms.transfers


def test_a_frozen_leader_needs_weights_for_these_classes(tmp_path):
    path = tmp_path / "leader.pt"
    torch.save(CifarResNet(20, 5, 1, 4).state_dict(), path)
    with pytest.raises(TeamNetError, match=r"leader\.pt is for 5 classes instead of 10.*frozen"):
        make_team(leader={"frozen": True, "checkpoint": str(path)})
    torch.save(resnet().state_dict(), path)
    assert make_team(leader={"frozen": True, "checkpoint": str(path)}).leader_frozen


def test_modules_in_evaluation_mode_are_trained():
    team = team_of_modules(leader=resnet().eval(), a=ElasticNet(resnet(), (1, 8, 8)).eval())
    assert all(module.training for module in team.modules())


def test_a_checkpoint_of_modules_needs_modules(tmp_path):
    team = team_of_modules()
    path = fit_and_save(team, tmp_path, batches=2)
    modules = {"leader": resnet(), "a": ElasticNet(resnet(), (1, 8, 8), depths=3)}
    other = ElasticNet(resnet(), (1, 8, 8), depths=3, interleaved=True)
    restored = Team.load_from_checkpoint(path, **modules, b=other)
    assert_same_state(restored.state_dict(), team.state_dict())
    with pytest.raises(ValueError, match=r"model.b was given as a module .*CifarResNet.*b=\.\.\."):
        Team.load_from_checkpoint(path, **modules)
    with pytest.raises(ValueError, match=r"model\.a was given as a module"):
        Teammate.from_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leader": CifarResNet(20, 5, 1, 4)}, r"leader \(CifarResNet\) .*\(N, 10\).*\(2, 5\)"),
        ({"a": CifarResNet(20, 5, 1, 4)}, r"a \(ElasticNet\) .*\(N, 10\).*\(2, 5\)"),
        ({"a": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}, "no residual block"),
    ],
)
def test_modules_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        team_of_modules(**changes)


def test_modules_may_not_share_weights():
    net = resnet()
    with pytest.raises(ValueError, match="leader and b share weights"):
        team_of_modules(leader=net, b=net)


def test_a_third_teammate_learns_from_and_teaches_the_others():
    team = make_team(
        extra_teammates={"c": TeammateConfig(**THIRD["c"])},
        cooperation=Cooperation(peer=PeerEdge(0.1), sub_networks=SubNetworkEdge(0.1)),
    )
    assert team.members()[-2:] == ["c/d7", "c/d1"]
    transfers = {str(transfer) for transfer in team.transfers}
    peers = {f"{teacher}/d7->{student}/d7" for teacher, student in permutations("abc", 2)}
    assert peers | {"leader->c/d7", "c/d7->c/d1"} <= transfers


def test_the_ensemble_averages_all_teammates():
    team = make_team(extra_teammates={"c": TeammateConfig(**THIRD["c"])}).eval()
    images = torch.randn(4, 1, 8, 8)
    logits = extracted_logits(team, images)
    expected = sum(logits[f"{name}/d7"].softmax(-1) for name in "abc") / 3
    with torch.no_grad():
        probabilities = team.predict_step((images, torch.zeros(4)), 0)
    torch.testing.assert_close(probabilities["ensemble"], expected)


@pytest.mark.parametrize("name", ["a", "leader", "ensemble", "c/d", "c.d", "", "1"])
def test_reserved_and_invalid_names_are_refused(name):
    with pytest.raises(ValueError, match=f"Teammate {name!r} needs another name"):
        make_team(extra_teammates={name: TeammateConfig(**THIRD["c"])})


@pytest.fixture(scope="module")
def three(cli, tmp_path_factory):
    """The checkpoints of a run of three Teammates, the third of which is in a config."""
    folder = tmp_path_factory.mktemp("three")
    model = {"extra_teammates": THIRD, "cooperation": {"peer": {"weight": 0.1}}}
    (folder / "third.yaml").write_text(json.dumps({"model": model}))
    cli(folder, "fit", "--config", "third.yaml", "--test_after_fit", "true")
    return (folder / BEST).parent


def test_a_third_teammate_needs_only_a_config(three):
    team = Team.load_from_checkpoint(three / "best.ckpt")
    assert list(team.teammates) == ["a", "b", "c"]
    rows = json.loads((three / "per_depth.json").read_text())
    assert [row["depth"] for row in rows if row["net"] == "c"] == ["d7", "d1"]
    names = logged_rows(three.parents[2])[0].keys()
    assert {"test/accuracy/c/d1", "train/kd/c/d7_to_a/d7"} <= names


def test_the_commands_accept_a_third_teammate(cli, three, tmp_path):
    path = three / "best.ckpt"
    cli(tmp_path, "test", "--ckpt_path", path, tiny=False)
    cli(tmp_path, "profile", "--ckpt_path", path, "--teammate", "c", "--runs", 1, tiny=False)
    assert (three / "profile_c_cpu.json").exists()
    words = ["--teammate", "c", "--out", "exported", "--formats", "[safetensors]"]
    cli(tmp_path, "export", "--ckpt_path", path, *words, tiny=False)
    manifest = json.loads((tmp_path / "exported/manifest.json").read_text())
    assert [depth["name"] for depth in manifest["depths"]] == ["d7", "d1"]
    predictor = Predictor.from_checkpoint(path, "c", depths=["d1"])
    team = Team.load_from_checkpoint(path).eval()
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        logits = extracted_logits(team, predictor.preprocessing(images))["c/d1"]
    probabilities = predictor.predict(images).probabilities
    torch.testing.assert_close(probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a, b, c; found d"):
        Teammate.from_checkpoint(path, "d")


def test_a_run_of_three_teammates_is_resumed(cli, three, tmp_path):
    last = three / "last.ckpt"
    options = ["--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2]
    cli(tmp_path, "fit", "--ckpt_path", last, *options, tiny=False)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    assert saved["global_step"] == 4
    assert saved["hyper_parameters"]["extra_teammates"]["c"]["depths"] == [7, 1]


def test_a_changed_third_teammate_is_refused_on_resuming(cli, three, tmp_path, capsys):
    third = json.dumps({"c": {**THIRD["c"], "depths": [7, 2]}})
    words = ["--ckpt_path", three / "last.ckpt", "--model.extra_teammates", third]
    error = error_of(capsys, cli, tmp_path, "fit", *words, tiny=False)
    assert "another extra_teammates.c.depths" in error

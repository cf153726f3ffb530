"""Kinds of transfer, chosen by class path on the command line and in checkpoints."""

import json
from dataclasses import dataclass

import pytest
import torch

from teamnet_pl import Team
from teamnet_pl.cooperation import (
    Cooperation,
    KLDivergence,
    LabelWeights,
    PeerEdge,
    SubNetworkEdge,
    TeacherEdge,
    Transfer,
    TransferKind,
)
from tests.helpers.runs import BEST, error_of, saved_config
from tests.helpers.teams import fit_and_save, make_team

OWN_KIND = """
from dataclasses import dataclass

import torch.nn.functional as F

from teamnet_pl.cooperation import TransferKind


@dataclass(frozen=True)
class MeanSquaredError(TransferKind):
    scale: float = 1.0

    def __call__(self, student, teacher, target):
        return self.scale * F.mse_loss(student, teacher)
"""


@dataclass(frozen=True)
class Constant(TransferKind):
    value: float = 1.0

    def __call__(self, student, teacher, target):
        assert not teacher.requires_grad
        return self.value + 0 * student.sum()


def test_each_group_of_transfers_has_its_kind():
    cooperation = Cooperation(
        leader=TeacherEdge(0.5, Constant(2.0)),
        peer=PeerEdge(0.5, Constant(3.0)),
        sub_networks=SubNetworkEdge(2.0),
        labels=LabelWeights(1.0, 1.0, 1.0),
    )
    team = make_team(cooperation=cooperation)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    terms = team.criterion.terms(team(images), torch.arange(4))
    assert terms.transfers["leader->a/d7"].item() == 2.0
    assert terms.transfers["b/d7->a/d7"].item() == 3.0
    assert terms.transfers["a/d7->a/d0"].item() not in (2.0, 3.0)
    labels = sum(terms.labels.values())
    sub_networks = [
        term for name, term in terms.transfers.items() if name[0] == name.split("->")[1][0]
    ]
    expected = labels + 0.5 * (6 * 2.0 + 6 * 3.0) + 2.0 * sum(sub_networks)
    torch.testing.assert_close(team.criterion.total(terms), expected)


def test_the_command_line_chooses_a_kind(cli, tmp_path):
    """Here one in the current folder, which is then in the config of the run."""
    (tmp_path / "my_kinds.py").write_text(OWN_KIND)
    kind = "--model.cooperation.peer.kind"
    options = [kind, "my_kinds.MeanSquaredError", f"{kind}.scale", 0.25]
    options += ["--model.cooperation.leader.kind.temperature", 3]
    cli(tmp_path, "fit", *options)
    cooperation = saved_config(tmp_path)["model"]["cooperation"]
    assert cooperation["peer"]["kind"] == {
        "class_path": "my_kinds.MeanSquaredError",
        "init_args": {"scale": 0.25},
    }
    assert cooperation["leader"]["kind"]["init_args"] == {"temperature": 3.0}
    with pytest.raises(ValueError, match=r"my_kinds\.MeanSquaredError, which runs code"):
        Team.load_from_checkpoint(tmp_path / BEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        team = Team.load_from_checkpoint(tmp_path / BEST, trust_import=True)
    assert team.criterion.cooperation.peer.kind.scale == 0.25
    assert team.criterion.cooperation.leader.kind == KLDivergence(3.0)


def test_a_users_own_kind_needs_trust(cli, tmp_path, capsys):
    (tmp_path / "my_other_kinds.py").write_text(OWN_KIND)
    kind = ["--model.cooperation.peer.kind", "my_other_kinds.MeanSquaredError"]
    cli(tmp_path, "fit", *kind)
    error = error_of(capsys, cli, tmp_path, "test", "--ckpt_path", BEST, tiny=False)
    assert "which runs code" in error
    cli(tmp_path, "test", "--ckpt_path", BEST, "--trust_import", "true", tiny=False)
    assert (tmp_path / "logs/version_0/checkpoints/per_depth.json").exists()


@pytest.mark.parametrize(
    "path",
    ["os.system", "teamnet_pl.cooperation.Team", "teamnet_pl.cooperation.kinds.F", "torch.nn.ReLU"],
)
def test_other_classes_in_a_checkpoint_are_refused(checkpoint, tmp_path, path):
    content = torch.load(checkpoint, weights_only=True)
    kind = {"class_path": path, "init_args": {}}
    content["hyper_parameters"]["cooperation"]["peer"]["kind"] = kind
    torch.save(content, tmp_path / "edited.ckpt")
    with pytest.raises(ValueError, match=r"edited\.ckpt"):
        Team.load_from_checkpoint(tmp_path / "edited.ckpt")


def test_extra_transfers_keep_their_kind(tmp_path):
    cooperation = Cooperation(
        extra=[Transfer(0.2, KLDivergence(3.0), teacher="b/d2", student="a/d0")]
    )
    team = make_team(cooperation=cooperation)
    restored = Team.load_from_checkpoint(fit_and_save(team, tmp_path))
    assert restored.criterion.cooperation == cooperation
    json.dumps(dict(restored.hparams))  # plain values


def test_a_kind_that_is_not_a_dataclass_is_refused():
    class NoDataclass(TransferKind):
        def __call__(self, student, teacher, target):
            return student.sum()

    with pytest.raises(ValueError, match=r"NoDataclass must be a dataclass.*@dataclass"):
        make_team(cooperation=Cooperation(peer=PeerEdge(0.5, NoDataclass())))


def test_two_transfers_of_the_same_name_are_refused():
    cooperation = Cooperation(extra=[Transfer(0.2, KLDivergence(), teacher="leader", student="a")])
    with pytest.raises(ValueError, match="2 transfers leader->a/d2"):
        cooperation.transfers({"a": ["d2", "d0"]}, has_leader=True)

"""A checkpoint alone restores a team, and no code in it is run."""

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from teamnet_pl import Team
from teamnet_pl.cooperation import (
    Cooperation,
    KLDivergence,
    LabelWeights,
    OptimizerConfig,
    PeerEdge,
    ScheduleConfig,
    TeacherEdge,
    Transfer,
)
from tests.helpers.teams import (
    assert_same_state,
    fit_and_save,
    make_digits,
    make_team,
    make_trainer,
)

# As different from the defaults as possible.
TEAM = {
    "leader": {"frozen": True},
    "a": {"depths": [7, 5, 1], "policy": "round_robin", "per_depth_affine": True},
    "b": {"depths": [[3, 2, 2], [1, 1, 1]], "blocks": ["layer*.[012]"]},
    "cooperation": Cooperation(
        leader=TeacherEdge(0.1, KLDivergence(1.5), ramp=0.5),
        peer=PeerEdge(0.3, teachers="nearest"),
        extra=[Transfer(0.2, KLDivergence(3.0), teacher="ensemble", student="a/d1")],
        labels=LabelWeights(others=0.5),
        member_weights={"a/d1": 2.0},
    ),
    "optimizer": OptimizerConfig("adamw", 1e-3, options={"betas": (0.8, 0.9)}),
    "schedule": ScheduleConfig(0.2, 0.1),
    "label_smoothing": 0.05,
}


@pytest.fixture(scope="module", params=[TEAM, {"leader": None, "b": None}], ids=["both", "a"])
def saved(request, tmp_path_factory):
    """A trained team and its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    team = make_team(**request.param)
    keep = ModelCheckpoint(folder, filename="kept", save_last=True)
    trainer = make_trainer(
        folder, callbacks=[keep], enable_checkpointing=True, limit_train_batches=3
    )
    trainer.fit(team, make_digits())
    return team.eval(), folder / "kept.ckpt"


def test_a_checkpoint_restores_the_team_without_arguments(saved):
    team, path = saved
    restored = Team.load_from_checkpoint(path).eval()
    assert_same_state(restored.state_dict(), team.state_dict())
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(restored(images), team(images), rtol=0, atol=0)
    assert restored.members() == team.members()
    for name, net in team.elastic_nets.items():
        assert restored.elastic_nets[name].depths == net.depths
        assert restored.elastic_nets[name].blocks == net.blocks
    assert restored.transfers == team.transfers
    assert restored.criterion.cooperation == team.criterion.cooperation
    assert restored.optimizer_config == team.optimizer_config
    assert restored.schedule_config == team.schedule_config
    assert restored.criterion.label_smoothing == team.criterion.label_smoothing
    assert restored.leader_frozen == team.leader_frozen
    assert dict(restored.hparams) == dict(team.hparams)


def test_a_checkpoint_loads_without_running_code(saved):
    assert torch.load(saved[1], weights_only=True)["state_dict"]


def test_hyper_parameters_are_plain_values(saved):
    hyper_parameters = torch.load(saved[1], weights_only=True)["hyper_parameters"]
    assert {"num_classes", "input_shape", "a", "cooperation"} <= hyper_parameters.keys()
    for value in hyper_parameters.values():
        check_plain(value)


def check_plain(value) -> None:
    assert type(value) in (dict, list, tuple, str, int, float, bool, type(None))
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner)


@pytest.mark.fault("a missing file of initial weights", "The checkpoint loads without it.")
@pytest.mark.parametrize("member", ["leader", "a", "b"])
def test_a_checkpoint_does_not_need_the_file_of_initial_weights(tmp_path, member):
    start = tmp_path / "start.pt"
    torch.save(make_team().leader.state_dict(), start)
    team = make_team(**{member: {"checkpoint": str(start)}})
    path = fit_and_save(team, tmp_path)
    start.unlink()
    assert_same_state(Team.load_from_checkpoint(path).state_dict(), team.state_dict())


def test_a_checkpoint_does_not_need_pretrained_weights(tmp_path, monkeypatch):
    fetched = []
    create = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        fetched.append(pretrained)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    options = {"img_size": 8, "patch_size": 4, "pretrained": True}
    team = make_team(b={"name": "timm/test_vit", "options": options})
    path = fit_and_save(team, tmp_path)
    assert_same_state(Team.load_from_checkpoint(path).state_dict(), team.state_dict())
    assert fetched == [True, False]

import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl.cooperation import Cooperation, PeerEdge, SubNetworkEdge, TeacherEdge, Team
from tests.helpers.teams import (
    assert_same_state,
    extracted_logits,
    fit_and_save,
    make_digits,
    make_team,
    make_trainer,
    snapshot,
)

THREE_ARCHITECTURES = {
    "leader": {},
    "a": {"name": "torchvision/mobilenet_v3_small", "options": {}, "depths": 2},
    "b": {"name": "timm/test_vit", "options": {"img_size": 8, "patch_size": 4}, "depths": 3},
}


class Calls:
    """Counts the calls of functions, each given by its owner and attribute."""

    def __init__(self, monkeypatch, **functions):
        self.counts = dict.fromkeys(functions, 0)
        for name, (owner, attribute) in functions.items():
            original = getattr(owner, attribute)
            monkeypatch.setattr(owner, attribute, self.counting(name, original))

    def counting(self, name, original):
        def counted(*args, **kwargs):
            self.counts[name] += 1
            return original(*args, **kwargs)

        return counted


def test_one_forward_one_backward_and_one_step_per_batch(tmp_path, monkeypatch):
    team = make_team()
    calls = Calls(
        monkeypatch,
        backward=(torch.Tensor, "backward"),
        step=(torch.optim.SGD, "step"),
        optimizer=(torch.optim.SGD, "__init__"),
        leader=(team.leader, "forward"),
        a=(team.teammates["a"].backbone, "forward"),
        b=(team.teammates["b"].backbone, "forward"),
    )
    make_trainer(tmp_path, limit_train_batches=3).fit(team, make_digits())
    assert calls.counts == {
        "optimizer": 1,
        "backward": 3,
        "step": 3,
        "leader": 3,
        "a": 3,
        "b": 3,
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_three_architectures_train(tmp_path, precision):
    team = make_team(**THREE_ARCHITECTURES)
    before = snapshot(team)
    trainer = make_trainer(
        tmp_path, limit_train_batches=2, limit_val_batches=1, precision=precision
    )
    trainer.fit(team, make_digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    for member in ("leader", "teammates.a", "teammates.b"):
        moved = [
            not torch.equal(value, before[name])
            for name, value in team.named_parameters()
            if name.startswith(f"{member}.")
        ]
        assert moved
        assert all(moved)


def test_bf16_logits_are_returned_in_single_precision():
    team = make_team()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert team.leader(torch.randn(2, 1, 8, 8)).dtype == torch.bfloat16
        logits = team(torch.randn(2, 1, 8, 8))
    assert {values.dtype for values in logits.values()} == {torch.float32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a team's checkpoint and a file of its Leader's weights; the team's state."""
    folder = tmp_path_factory.mktemp("weights")
    team = make_team(seed=1, a={"depths": 4})
    fit_and_save(team, folder, batches=2)
    torch.save(team.leader.state_dict(), folder / "plain.pt")
    return folder, snapshot(team)


@pytest.mark.parametrize("member", ["leader", "a", "b"])
@pytest.mark.parametrize(
    ("file", "prefix"),
    [("plain.pt", ""), ("team.ckpt", "leader."), ("team.ckpt", "teammates.a.backbone.")],
)
def test_members_start_from_checkpoints(weights, member, file, prefix):
    folder, trained = weights
    config = {"checkpoint": str(folder / file), "checkpoint_prefix": prefix}
    team = make_team(**{member: config})
    net = team.leader if member == "leader" else team.teammates[member].backbone
    source = prefix or "leader."
    expected = {
        name.removeprefix(source): value
        for name, value in trained.items()
        if name.startswith(source)
    }
    assert_same_state(net.state_dict(), expected)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"checkpoint": "team.ckpt"}, ValueError, "begin with leader, teammates"),
        ({"checkpoint": "team.ckpt", "checkpoint_prefix": "leder."}, ValueError, "'leder.'"),
        ({"checkpoint": "plain.pt", "options": {"width": 5}}, ValueError, "size mismatch"),
        ({"checkpoint": "none.pt"}, FileNotFoundError, "none.pt"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, config, error, message):
    config = config | {"checkpoint": str(weights[0] / config["checkpoint"])}
    with pytest.raises(error, match=message):
        make_team(leader=config)


def test_a_frozen_leader_does_not_change(tmp_path):
    team = make_team(leader={"frozen": True})
    before = snapshot(team.leader)
    modes = []

    def note_mode(module, args):
        modes.append(module.training)

    team.leader.register_forward_pre_hook(note_mode)
    trainer = make_trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, max_epochs=2)
    trainer.fit(team, make_digits())
    assert modes
    assert not any(modes)
    assert all(module.training for module in team.teammates.modules())
    assert_same_state(team.leader.state_dict(), before)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in team.teammates.parameters()}
    assert "train/ce/leader" not in trainer.callback_metrics
    assert trainer.callback_metrics["train/kd/leader_to_a/d7"] > 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_frozen_leader_is_always_in_evaluation_mode(mode):
    team = make_team(leader={"frozen": True})
    assert not any(module.training for module in team.leader.modules())
    getattr(team, mode)()
    assert not any(module.training for module in team.leader.modules())
    assert team.training == (mode == "train")


# Teacher->student pairs, without the weights.
STUDENTS = ["a/d7", "a/d4", "a/d0", "b/d7", "b/d5", "b/d2"]
LEADER = {f"leader->{student}" for student in STUDENTS}
PEER = {f"b/d7->{student}" for student in STUDENTS[:3]}
PEER |= {f"a/d7->{student}" for student in STUDENTS[3:]}
DEPTHS = {"a/d7->a/d4", "a/d7->a/d0", "b/d7->b/d5", "b/d7->b/d2"}
ALL = {"peer": PeerEdge(0.1), "sub_networks": SubNetworkEdge(0.1)}


@pytest.mark.parametrize(
    ("members", "weights", "expected"),
    [
        ({}, {}, LEADER),
        ({}, ALL, LEADER | PEER | DEPTHS),
        ({"leader": None}, {}, set()),
        ({"leader": None}, ALL, PEER | DEPTHS),
        ({"b": None}, {}, {"leader->a/d7", "leader->a/d4", "leader->a/d0"}),
        ({}, ALL | {"leader": TeacherEdge(0.0)}, PEER | DEPTHS),
        ({}, ALL | {"peer": PeerEdge(0.0)}, LEADER | DEPTHS),
        ({}, ALL | {"sub_networks": SubNetworkEdge(0.0)}, LEADER | PEER),
    ],
    ids=[
        *("default", "all", "labels alone", "no leader", "no b"),
        *("leader off", "peer off", "depths off"),
    ],
)
def test_transfers_without_a_weight_are_left_out(tmp_path, members, weights, expected):
    team = make_team(**members, cooperation=Cooperation(**weights))
    assert {str(transfer) for transfer in team.transfers} == expected
    trainer = make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(team, make_digits())
    logged = {name for name in trainer.callback_metrics if "kd" in name}
    assert logged == {"train/kd/" + transfer.replace("->", "_to_") for transfer in expected}


def test_members_are_named_by_teammate_and_depth():
    team = make_team()
    members = ["leader", "a/d7", "a/d4", "a/d0", "b/d7", "b/d5", "b/d2"]
    assert team.members() == members
    assert list(team(torch.randn(2, 1, 8, 8))) == members
    assert make_team(leader=None, b=None).members() == ["a/d7", "a/d4", "a/d0"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [(3, 2, 2), (3, 1, 0), (0, 0, 0)]),
        ({"policy": "round_robin"}, [(3, 2, 2), (2, 1, 1), (0, 0, 0)]),
        ({"depths": [7, 6], "policy": "first_stage_first"}, [(3, 2, 2), (2, 2, 2)]),
        ({"interleaved": True}, [(3, 2, 2), (3, 2, 0), (2, 0, 0)]),
        ({"blocks": ["layer1.*"], "depths": 2}, [(3,), (0,)]),
        ({"depths": [[3, 2, 2], [1, 1, 0]]}, [(3, 2, 2), (1, 1, 0)]),
    ],
    ids=str,
)
def test_a_teammate_has_the_depths_of_its_config(config, expected):
    depths = make_team(a=config).elastic_nets["a"].depths
    assert [depth.per_stage for depth in depths] == expected


@pytest.mark.parametrize("per_depth", [False, True])
def test_norm_weights_are_shared_or_per_depth(per_depth):
    net = make_team(a={"per_depth_affine": per_depth}).elastic_nets["a"]
    (copy, *_) = net.norms["layer3-0-bn1"]
    assert (copy.weight is net.backbone.layer3[0].bn1.weight) != per_depth


def test_gradient_checkpointing_does_not_change_training(tmp_path):
    runs, states = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        team = make_team(a={"grad_checkpointing": checkpointing})
        calls = []
        for net in team.elastic_nets.values():
            layer = net.backbone.layer1[1].conv1
            layer.register_forward_hook(lambda conv, *_, calls=calls: calls.append(conv.training))
        make_trainer(tmp_path, limit_train_batches=3).fit(team, make_digits())
        runs.append(sum(calls))
        states.append(team.state_dict())
    assert runs == [3 + 3, 6 + 3]  # of a and of b
    assert_same_state(*states)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"num_classes": 1}, "2 classes"),
        ({"a": {"depths": 20}}, "2 to 8 depths"),
        ({"b": {"name": "cifar/resnet21"}}, "cifar/resnet20"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_team(**kwargs)


def measured(probabilities, labels):
    """The metrics of one member over a whole split."""
    of_label = probabilities[np.arange(len(labels)), labels]
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    gaps = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gaps += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    metrics = {
        "accuracy": correct.mean(),
        "loss": -np.log(of_label).mean(),
        "calibration_error": gaps,
    }
    if probabilities.shape[1] > 5:
        metrics["accuracy_top5"] = ((probabilities > of_label[:, None]).sum(1) < 5).mean()
    return metrics


def metrics_by_hand(team, stage, images, labels):
    """All metrics of a team, of each member alone."""
    probabilities = {
        member: logits.double().softmax(-1).numpy()
        for member, logits in extracted_logits(team, images).items()
    }
    accuracies = [
        (of_member.argmax(1) == labels).mean()
        for member, of_member in probabilities.items()
        if member != "leader"
    ]
    if len(team.elastic_nets) > 1:
        nets = team.elastic_nets.items()
        deepest = [probabilities[f"{name}/{net.depths[0]}"] for name, net in nets]
        probabilities["ensemble"] = np.mean(deepest, axis=0)
    metrics = {
        f"{stage}/{name}/{member}": value
        for member, of_member in probabilities.items()
        for name, value in measured(of_member, labels).items()
    }
    predicted = {member: of_member.argmax(1) for member, of_member in probabilities.items()}
    for name, net in team.elastic_nets.items():
        for depth in net.depths[1:]:
            differs = predicted[f"{name}/{depth}"] != predicted[f"{name}/{net.depths[0]}"]
            metrics[f"{stage}/disagreement/{name}/{depth}"] = differs.mean()
    return metrics | {f"{stage}/accuracy/mean": np.mean(accuracies)}


@pytest.mark.parametrize("members", [{}, {"b": None}, {"leader": None}], ids=str)
@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_of_each_depth_cover_the_whole_split(tmp_path, members, stage):
    team = make_team(**members)
    data = make_digits(batch_size=64)  # does not divide either split
    trainer = make_trainer(tmp_path, limit_train_batches=10, limit_val_batches=1.0, max_epochs=2)
    trainer.fit(team, data)
    evaluate = trainer.validate if stage == "val" else trainer.test
    (metrics,) = evaluate(team, data, verbose=False)
    loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(labels) % 64
    expected = metrics_by_hand(team, stage, data.normalize(images), labels.numpy())
    assert len({value for name, value in expected.items() if "/loss/" in name}) > 2
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_five_classes_have_no_top5_accuracy(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(20, 1, 8, 8, generator=generator), torch.arange(20) % 5
    team = make_team(num_classes=5)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    (metrics,) = make_trainer(tmp_path).test(team, loader, verbose=False)
    expected = metrics_by_hand(team, "test", images, labels.numpy())
    assert not any("top5" in name for name in expected)
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_metrics_are_reset_in_each_epoch(tmp_path):
    team, data = make_team(), make_digits()
    trainer = make_trainer(tmp_path, limit_train_batches=5, limit_val_batches=1.0, max_epochs=3)
    trainer.fit(team, data)
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if "val/" in name}
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    expected = metrics_by_hand(team, "val", data.normalize(images), labels.numpy())
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_predictions_are_class_probabilities_of_each_member(tmp_path):
    team, data = make_team(), make_digits(batch_size=64)
    predictions = make_trainer(tmp_path).predict(team, data)
    images = data.normalize(next(iter(data.test_dataloader()))[0])
    team.eval()
    with torch.no_grad(), team.teammates["b"].at("d5") as net:
        torch.testing.assert_close(predictions[0]["b/d5"], net(images).softmax(-1))
    first, *_, last = predictions[0]
    assert (first, last) == ("leader", "ensemble")
    assert sum(len(batch["leader"]) for batch in predictions) == len(data.test_set)


def test_default_configs_cannot_be_changed_in_place():
    """All teams share them."""
    defaults = [parameter.default for parameter in inspect.signature(Team).parameters.values()]
    configs = [default for default in defaults if is_dataclass(default)]
    assert len(configs) >= 4
    for config in configs:
        for field in fields(config):
            with pytest.raises(FrozenInstanceError):
                setattr(config, field.name, getattr(config, field.name))


def test_logged_metrics_names_all_metrics_of_a_run(tmp_path):
    team, names = make_team(on_non_finite="skip"), set()

    class Names(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            names.update(trainer.callback_metrics)

    trainer = make_trainer(tmp_path, callbacks=[Names()], limit_val_batches=1)
    trainer.fit(team, make_digits())
    names |= set(trainer.callback_metrics)
    trainer.test(team, make_digits(), verbose=False)
    assert names | set(trainer.callback_metrics) == set(team.logged_metrics())

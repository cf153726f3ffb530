"""Averaged teachers, and gradients that are averaged over depths."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from teamnet_pl.cooperation import Cooperation, OptimizerConfig, ScheduleConfig
from teamnet_pl.cooperation.averaging import AveragedTeachers
from tests.helpers.teams import CONSTANT, make_digits, make_team, make_trainer

DECAY = 0.8


class Weights(pl.Callback):
    """Keeps the nets' weights and buffers after each batch."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, team, *args):
        nets = {"leader": team.leader} | dict(team.teammates.items())
        self.kept.append({name: copy.deepcopy(net.state_dict()) for name, net in nets.items()})


def test_the_averages_are_those_of_the_steps(tmp_path):
    team = make_team(b=None, cooperation=Cooperation(averaged_teachers=DECAY), schedule=CONSTANT)
    weights = Weights()
    trainer = make_trainer(
        tmp_path, callbacks=[weights], limit_train_batches=8, accumulate_grad_batches=2
    )
    trainer.fit(team, make_digits())
    for name, average in team.averaged_teachers.averages.items():
        # A step every two batches; the last one is taken in when another batch follows.
        steps = [kept[name] for kept in weights.kept[1:-1:2]]
        for key, value in average.module.state_dict().items():
            expected = steps[0][key].double()
            for step in steps[1:]:
                expected = DECAY * expected + (1 - DECAY) * step[key].double()
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_averages_teach_in_evaluation_mode_in_place_of_the_nets():
    team = make_team(cooperation=Cooperation(averaged_teachers=DECAY))
    averaged = team.averaged_teachers
    assert isinstance(averaged, AveragedTeachers)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    team.train()
    images = torch.randn(8, 1, 8, 8)
    logits = averaged.logits(dict.fromkeys(team.members()), images)
    assert sorted(logits) == ["a/d7", "b/d7", "leader"]
    for name, member in {"leader": "leader", "a": "a/d7", "b": "b/d7"}.items():
        net = averaged.averages[name].module
        with torch.no_grad():
            torch.testing.assert_close(logits[member], net.eval()(images))
    assert list(averaged.logits({"leader": None}, images)) == ["leader"]
    assert all(not parameter.requires_grad for parameter in averaged.parameters())


def test_the_terms_of_a_step_are_those_of_averaged_teachers(tmp_path):
    team = make_team(
        b=None,
        cooperation=Cooperation(averaged_teachers=DECAY),
        optimizer=OptimizerConfig(lr=0.05),
        schedule=ScheduleConfig(leader_finish=0.5),
    )
    expected = []

    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, team, batch, batch_idx):
            # A finished Leader teaches itself. The averages take the last step in first.
            averaged = copy.deepcopy(team.averaged_teachers)
            averaged.update({"leader": team.leader, "a": team.teammates["a"]}, batch_idx)
            leader = copy.deepcopy(team.leader if batch_idx >= 2 else averaged.averages["leader"])
            leader.eval()
            student = copy.deepcopy(team.teammates["a"]).train()
            with torch.no_grad():
                teacher = (leader(batch[0]) / 4).log_softmax(-1)
                logits = (student.packed(batch[0])[-1] / 4).log_softmax(-1)
            loss = 16 * F.kl_div(logits, teacher, reduction="batchmean", log_target=True)
            expected.append(loss.item())

        def on_train_batch_end(self, trainer, team, *args):
            actual = trainer.callback_metrics["train/kd/leader_to_a/d0"].item()
            torch.testing.assert_close(actual, expected[-1], rtol=1e-4, atol=1e-5)

    make_trainer(tmp_path, callbacks=[ByHand()], limit_train_batches=4).fit(team, make_digits())
    assert len(expected) == 4


class Gradients(pl.Callback):
    """Keeps the gradients that the optimizer stepped with."""

    def on_train_batch_end(self, trainer, team, *args):
        named = team.teammates["a"].backbone.named_parameters()
        self.kept = {name: weight.grad.clone() for name, weight in named}


def test_mean_gradients_are_divided_by_the_depths_that_share_a_weight(tmp_path):
    kept = []
    for kind in ("sum", "mean"):
        team = make_team(leader=None, b=None, a={"shared_gradients": kind, "depths": [7, 5, 2, 0]})
        gradients = Gradients()
        trainer = make_trainer(tmp_path, callbacks=[gradients], limit_train_batches=1)
        trainer.fit(team, make_digits())
        kept.append(gradients.kept)
    shared = {"layer1.0": 3, "layer1.1": 3, "layer1.2": 2, "layer2.1": 2, "layer2.2": 2}
    shared |= {"layer3.1": 1, "layer3.2": 1}
    for name, gradient in kept[0].items():
        number = shared.get(name[: len("layer1.0")], 4)
        torch.testing.assert_close(kept[1][name], gradient / number)


def test_the_depths_that_share_a_weight_are_counted_by_layer():
    net = make_team(a={"per_depth_affine": True, "depths": [7, 5, 2, 0]}).elastic_nets["a"]
    counts = dict(net.shared_parameters())
    assert counts.keys() == set(net.parameters())
    # Up to the last stage d7 and d5 run the same blocks, so they share a batch norm there.
    norms = [net.backbone.layer3[0].bn1, *net.norms["layer3-0-bn1"]]
    assert [counts[norm.weight] for norm in norms] == [2, 1, 1]
    assert counts[net.backbone.layer1[0].bn1.weight] == 3
    assert counts[net.backbone.fc.weight] == 4


def test_other_nets_do_not_know_which_depths_share_a_weight():
    with pytest.raises(ValueError, match="SeparateNets does not know how many depths share"):
        make_team(a={"shared_gradients": "mean", "net": "teamnet_pl.baselines.SeparateNets"})

"""A step of `baseline/progressive_shrinking` is that of Once-for-All's own code, on its own net."""

import copy
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from ofa.imagenet_classification.elastic_nn.networks.ofa_resnets import OFAResNets
from ofa.imagenet_classification.elastic_nn.training.progressive_shrinking import train_one_epoch

from teamnet_pl import ElasticNet
from teamnet_pl.config_files import config_path
from teamnet_pl.cooperation import Cooperation, CooperativeLoss
from teamnet_pl.cooperation.members import member_logits

DEPTHS = {2: [3, 3, 5, 3], 1: [2, 2, 4, 2], 0: [1, 1, 3, 1]}
"""Skippable blocks that its depths keep in each stage of a ResNet-50, with two more per stage."""


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = OFAResNets(10, depth_list=list(DEPTHS), expand_ratio_list=0.25, width_mult_list=0.125)
    net.set_max_net()
    return net.double().train()


def their_gradients(net, images, labels, monkeypatch):
    """Runs Once-for-All's training loop for one batch, over all depths instead of random ones."""
    depths = iter(DEPTHS)

    def next_depth():
        settings = {"d": [max(DEPTHS), *[next(depths)] * 4]}
        net.set_active_subnet(**settings)
        return settings

    monkeypatch.setattr(net, "sample_active_subnet", next_depth)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    runs = SimpleNamespace(
        net=net,
        network=net,
        optimizer=SimpleNamespace(step=lambda: None),
        run_config=SimpleNamespace(
            train_loader=[(images, labels)], adjust_learning_rate=lambda *_: 0.0
        ),
        train_criterion=F.cross_entropy,
        get_metric_dict=dict,
        update_metric=lambda *_: None,
        get_metric_vals=lambda *_, **__: {},
    )
    args = SimpleNamespace(
        kd_ratio=1.0, kd_type="ce", teacher_model=copy.deepcopy(net), dynamic_batch_size=len(DEPTHS)
    )
    train_one_epoch(runs, args, epoch=0)
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
def test_gradients_equal_those_of_its_own_loop(net, monkeypatch):
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    elastic = ElasticNet(copy.deepcopy(net), (3, 64, 64), depths=list(DEPTHS.values()))
    config = yaml.safe_load(config_path("baseline/progressive_shrinking").read_text())["model"]
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--cooperation", type=Cooperation)
    parsed = parser.parse_object({"cooperation": config["cooperation"]})
    cooperation = parser.instantiate_classes(parsed).cooperation

    loss = CooperativeLoss({"a": elastic.depths}, cooperation, leader=False)
    elastic.train()
    loss(member_logits({"a": elastic}, None, images), labels).backward()

    theirs = their_gradients(net, images, labels, monkeypatch)
    ours = {name: parameter.grad for name, parameter in elastic.backbone.named_parameters()}
    assert sum(gradient is not None for gradient in theirs.values()) == len(ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)

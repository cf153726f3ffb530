"""Small teams, data and trainers, and the truth that teams are held against."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.func import functional_call

from teamnet_pl import LeaderConfig, Team, TeammateConfig
from teamnet_pl.backbones import CifarResNet
from teamnet_pl.cooperation import ScheduleConfig
from teamnet_pl.data import Digits

CONSTANT = ScheduleConfig(warmup=0.0, final=1.0)
"""A learning rate that stays."""

WIDTH = 4


def make_team(*, leader={}, a={}, b={}, seed=0, **kwargs) -> Team:  # noqa: B006 (never changed)
    """A team on 8x8 images; each member is given by what differs from a tiny ResNet-20, or None."""
    tiny = {"name": "cifar/resnet20", "options": {"width": WIDTH}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Team(
            kwargs.pop("num_classes", 10),
            kwargs.pop("input_shape", (1, 8, 8)),
            leader=None if leader is None else LeaderConfig(**tiny | leader),
            a=TeammateConfig(**tiny | {"depths": 3} | a),
            b=None
            if b is None
            else TeammateConfig(**tiny | {"depths": 3, "interleaved": True} | b),
            **kwargs,
        )


def make_digits(**kwargs) -> Digits:
    """Digits without augmentation, in the same order each time."""
    pl.seed_everything(0, workers=True, verbose=False)
    return Digits(**{"batch_size": 32, "train_transform": []} | kwargs)


def make_trainer(folder, **kwargs) -> pl.Trainer:
    """A trainer that does nothing but train."""
    quiet = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**quiet | kwargs)


def plain_nets(team: Team) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each member's own net, and one with the same blocks that was never elastic."""
    nets = {} if team.leader is None else {"leader": (team.leader, [])}
    for name, net in team.elastic_nets.items():
        for depth in net.depths:
            kept = zip(net.blocks, depth.kept, strict=True)
            skipped = [block.name for block, is_kept in kept if not is_kept]
            nets[f"{name}/{depth.name}"] = (net.backbone, skipped)
    found = {}
    for member, (net, skipped) in nets.items():
        conv = net.conv1
        plain = CifarResNet(20, net.fc.out_features, conv.in_channels, conv.out_channels)
        plain.to(conv.weight.dtype).load_state_dict(net.state_dict())
        for block in skipped:
            plain.set_submodule(block, nn.Identity())
        found[member] = (net, plain)
    return found


def logits_by_hand(team: Team, images) -> dict[str, torch.Tensor]:
    """Logits in training, each member alone in a plain net with the team's own parameters."""
    logits = {}
    for member, (net, plain) in plain_nets(team).items():
        plain.train(not (member == "leader" and team.leader_frozen))
        own = dict(net.named_parameters())
        own = {name: own[name] for name, _ in plain.named_parameters()}
        logits[member] = functional_call(plain, own, (images,))
    return logits


def extracted_logits(team: Team, images) -> dict[str, torch.Tensor]:
    """Logits in evaluation, each member alone as a net of its own."""
    team.eval()
    with torch.no_grad():
        logits = {} if team.leader is None else {"leader": team.leader(images)}
        for name, net in team.elastic_nets.items():
            for depth in net.depths:
                logits[f"{name}/{depth}"] = net.extract(depth).eval()(images)
    return logits


class Recorder(pl.Callback):
    """Keeps the weights after each step and the learning rate of each step."""

    def __init__(self) -> None:
        self.weights, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(snapshot(pl_module))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(found, expected, **tolerance) -> None:
    """Compares two state dicts, exactly unless told otherwise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limits = {"rtol": 0, "atol": 0} | tolerance
        torch.testing.assert_close(found[name], value, **limits, msg=f"{name} differs")

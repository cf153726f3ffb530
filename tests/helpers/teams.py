"""Small teams, data and trainers, and the plain nets that teams are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from teamnet_pl import LeaderConfig, Team, TeammateConfig
from teamnet_pl.backbones import CifarResNet
from teamnet_pl.cooperation import ScheduleConfig
from teamnet_pl.data import Digits
from teamnet_pl.elastic import ElasticNet

CONSTANT = ScheduleConfig(warmup=0.0, final=1.0)
"""A constant learning rate."""

TINY_RESNET: dict[str, Any] = {"name": "cifar/resnet20", "options": {"width": 4}}
AS_IS: Mapping[str, Any] = {}


def make_team(
    *,
    leader: Mapping[str, Any] | None = AS_IS,
    a: Mapping[str, Any] = AS_IS,
    b: Mapping[str, Any] | None = AS_IS,
    seed: int = 0,
    **kwargs: Any,
) -> Team:
    """A team of tiny ResNet-20s on 8x8 images.

    Args:
        leader: What differs in the config of the Leader; None for no Leader.
        a: What differs in the config of Teammate a.
        b: What differs in the config of Teammate b; None for no such Teammate.
        seed: Seed of the weights.
        **kwargs: Other arguments of the team.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Team(
            kwargs.pop("num_classes", 10),
            kwargs.pop("input_shape", (1, 8, 8)),
            leader=None if leader is None else LeaderConfig(**{**TINY_RESNET, **leader}),
            a=TeammateConfig(**{**TINY_RESNET, "depths": 3, **a}),
            b=None
            if b is None
            else TeammateConfig(**{**TINY_RESNET, "depths": 3, "interleaved": True, **b}),
            **kwargs,
        )


def make_digits(**kwargs: Any) -> Digits:
    """Digits without augmentation, in the same order each time."""
    pl.seed_everything(0, workers=True, verbose=False)
    options: dict[str, Any] = {"batch_size": 32, "train_transform": []}
    return Digits(**options | kwargs)


def make_trainer(folder: Path | None, **kwargs: Any) -> pl.Trainer:
    """A trainer that does nothing but train."""
    quiet: dict[str, Any] = {
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


def fit_and_save(team: Team, folder: Path, batches: int = 1) -> Path:
    """Trains a team on a few batches of digits; returns the path of its checkpoint."""
    trainer = make_trainer(folder, limit_train_batches=batches)
    trainer.fit(team, make_digits())
    trainer.save_checkpoint(folder / "team.ckpt")
    return folder / "team.ckpt"


def plain_nets(team: Team) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each member's net, and one with the same blocks and weights that was never elastic."""
    members: dict[str, tuple[Any, list[str]]] = {}
    if team.leader is not None:
        members["leader"] = (team.leader, [])
    for name, net in team.elastic_nets.items():
        assert isinstance(net, ElasticNet)
        for depth in net.depths:
            kept = zip(net.blocks, depth.kept, strict=True)
            skipped = [block.name for block, is_kept in kept if not is_kept]
            members[f"{name}/{depth.name}"] = (net.backbone, skipped)
    nets: dict[str, tuple[nn.Module, nn.Module]] = {}
    for member, (resnet, skipped) in members.items():
        conv = resnet.conv1
        plain = CifarResNet(20, resnet.fc.out_features, conv.in_channels, conv.out_channels)
        plain.to(conv.weight.dtype).load_state_dict(resnet.state_dict())
        for block in skipped:
            plain.set_submodule(block, nn.Identity())
        nets[member] = (resnet, plain)
    return nets


def logits_by_hand(team: Team, images: Tensor, leader_trains: bool = True) -> dict[str, Tensor]:
    """Logits in training, each member alone in a plain net with the team's own parameters."""
    logits = {}
    for member, (net, plain) in plain_nets(team).items():
        plain.train(member != "leader" or leader_trains)
        names = [name for name, _ in plain.named_parameters()]
        parameters: dict[str, Tensor] = {name: net.get_parameter(name) for name in names}
        logits[member] = functional_call(plain, parameters, (images,))
    return logits


def extracted_logits(team: Team, images: Tensor) -> dict[str, Tensor]:
    """Logits in evaluation, each member alone as an extracted net."""
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
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        self.weights.append(snapshot(pl_module))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerance: float
) -> None:
    """Compares two states, exactly unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    limits: dict[str, Any] = {"rtol": 0, "atol": 0} | tolerance
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **limits, msg=f"{name} differs")

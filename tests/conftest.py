"""Small teams, data and trainers, and the truth that teams are held against."""

import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.func import functional_call

from teamnet_pl import LeaderConfig, Team, TeammateConfig
from teamnet_pl.backbones import CifarResNet
from teamnet_pl.cli import main
from teamnet_pl.cooperation import ScheduleConfig
from teamnet_pl.data import Digits

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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny nets are slower on more, and much slower where processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for subprocesses
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """What is in this file, for all tests."""
    return SimpleNamespace(
        Recorder=Recorder,
        assert_same_state=assert_same_state,
        constant=ScheduleConfig(warmup=0.0, final=1.0),
        digits=make_digits,
        logits_by_hand=logits_by_hand,
        extracted_logits=extracted_logits,
        plain_nets=plain_nets,
        snapshot=snapshot,
        team=make_team,
        trainer=make_trainer,
    )


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    """Runs the command line in a folder of its own, on tiny nets unless told otherwise."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(TINY)

    def run(folder, subcommand, *args, tiny=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main([subcommand, *(["--config", str(config)] if tiny else []), *map(str, args)])

    run.config = config
    return run


@pytest.fixture(scope="session")
def checkpoint(cli, tmp_path_factory):
    """As `teamnet fit` leaves it: depths have their own statistics, per_depth.json lies beside."""
    folder = tmp_path_factory.mktemp("fitted")
    cli(folder, "fit", "--test_after_fit", "true")
    return folder / "logs/version_0/checkpoints/best.ckpt"


TINY = """
data:
  class_path: Digits
  init_args: {batch_size: 32, train_transform: []}
model:
  leader: {options: {width: 4}}
  a: {options: {width: 4}, depths: 3}
  b: {options: {width: 4}, depths: 3, interleaved: true}
trainer:
  accelerator: cpu
  devices: 1
  enable_model_summary: false
  enable_progress_bar: false
  limit_train_batches: 2
  log_every_n_steps: 1
  max_epochs: 1
"""


@pytest.fixture(scope="session")
def own_nets(tmp_path_factory):
    """Folder with a module ``own_nets``, on Python's path, as a user has one."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(OWN_NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_nets", None)


OWN_NETS = '''
from torch import nn

from teamnet_pl.data import Digits


class FewDigits(Digits):
    """Keeps few images, or all."""

    def __init__(self, keep: int | None = 100, **kwargs):
        super().__init__(train_size=keep, **kwargs)


class PoisonedDigits(Digits):
    """An image of the second training batch of the last process is NaN."""

    batches = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.batches += 1
            if self.batches == 2 and self.trainer.global_rank == self.trainer.world_size - 1:
                images[0] = float("nan")
        return images, labels


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())


class GroupNormNet(nn.Sequential):
    """Without batch norm, so that a batch may be cut in two."""

    def __init__(self, num_classes, in_channels, width=4):
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            *(Residual(width) for _ in range(4)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


def counts_classes(num_classes):
    """Takes no number of channels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


def takes_anything(**kwargs):
    return GroupNormNet(**kwargs)
'''

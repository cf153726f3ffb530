"""Every config that comes with the package is accepted, and runs."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torchvision.models import WeightsEnum

from teamnet_pl import Team
from tests.helpers.datasets import DatasetWriter, write_mnist

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "sweep.yaml"})
PARTS = sorted(CONFIGS.glob("*/*.yaml"))
WHOLE = {
    "recipe/cifar10": "cifar10",
    "recipe/cifar100": "cifar100",
    "recipe/finetune": "imagenet",
    "recipe/imagenet": "imagenet",
    "recipe/tiny_imagenet": "tiny_imagenet",
}
"""The recipes that have all that a run needs, with their data."""


def name(path):
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    """A folder with the four files of Fashion-MNIST, of a few random images."""
    return write_mnist(tmp_path_factory.mktemp("fashion_mnist"), {"train": 400, "t10k": 100})


def options_for(data, fashion_mnist):
    if data.endswith("FashionMNIST"):
        size = ["--data.init_args.train_size", 300]
        return ["--data.init_args.root", fashion_mnist, *size]
    return []


def test_there_are_configs():
    assert len(RUNS) >= 2
    assert len(PARTS) >= 10


@pytest.mark.parametrize("path", [*RUNS, *PARTS], ids=name)
def test_the_first_line_is_one_sentence(path):
    first, _, _ = path.read_text().partition("\n")
    assert re.fullmatch(r"# [A-Z].{9,}[^.]\.", first)
    assert ". " not in first


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_each_run_config_runs(cli, tmp_path, fashion_mnist, path):
    options = options_for(yaml.safe_load(path.read_text())["data"]["class_path"], fashion_mnist)
    options += ["--trainer.fast_dev_run", 1, "--trainer.accelerator", "cpu"]
    cli(tmp_path, "fit", "--config", path, *options, tiny=False)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_each_partial_config_applies_and_round_trips(cli, capsys, tmp_path, path):
    def printed(*args, **kwargs):
        with pytest.raises(SystemExit) as exit_:
            cli(tmp_path, "fit", *args, "--print_config", **kwargs)
        assert exit_.value.code == 0
        return capsys.readouterr().out

    first = printed("--config", path)
    assert_contains(yaml.safe_load(first), yaml.safe_load(path.read_text()))
    (tmp_path / "printed.yaml").write_text(first)
    assert printed("--config", "printed.yaml", tiny=False) == first


def assert_contains(config, part):
    if isinstance(part, dict):
        for key, value in part.items():
            assert_contains(config[key], value)
    elif isinstance(part, list):
        for value, expected in zip(config, part, strict=True):
            assert_contains(value, expected)
    else:
        assert config == part or str(config).endswith(f".{part}")


def is_partial(path):
    """Whether a config runs on any data; those of datasets run in tests/data/test_datasets.py."""
    return path.parent.name != "data" and name(path) not in WHOLE


@pytest.mark.parametrize("path", list(filter(is_partial, PARTS)), ids=name)
def test_each_partial_config_runs(cli, tmp_path, path):
    options = ["--trainer.fast_dev_run", 1]
    if path.parent.name == "team":
        # Made for Fashion-MNIST's size.
        options += ["--data.init_args.image_size", 28, "--data.init_args.batch_size", 4]
    cli(tmp_path, "fit", "--config", path, *options)


@pytest.fixture
def fit_recipe(cli, tmp_path, monkeypatch):
    """Runs a step of a recipe on a few images in the format of its data.

    Returns the team, and its weights before the step.
    """
    started = []
    start = Team.on_train_start

    def keep(team):
        started.append((team, {name: value.clone() for name, value in team.state_dict().items()}))
        start(team)

    def run(recipe):
        monkeypatch.setattr(Team, "on_train_start", keep)
        root = getattr(DatasetWriter(tmp_path, monkeypatch), WHOLE[recipe])()
        options = ["--data.root", root, "--data.val_fraction", 0.25, "--data.batch_size", 2]
        if WHOLE[recipe] == "imagenet":
            options += ["--data.image_size", 64]
        options += ["--trainer.fast_dev_run", 1, "--trainer.accelerator", "cpu"]
        # Lightning warns that it does not know the size of a net in bfloat16.
        options += ["--trainer.enable_model_summary", "false"]
        cli(tmp_path, "fit", "--config", recipe, *options, tiny=False)
        return started[0]

    return run


@pytest.mark.parametrize("recipe", [recipe for recipe in WHOLE if recipe != "recipe/finetune"])
def test_each_recipe_trains_two_teammates_with_a_larger_leader(fit_recipe, recipe):
    team, before = fit_recipe(recipe)
    assert len(team.members()) == 1 + 2 * 4
    assert not team.leader_frozen
    sizes = [sum(p.numel() for p in net.parameters()) for net in team.backbones()]
    assert sizes[0] > sizes[1] == sizes[2]
    for name in "ab":
        weight = f"teammates.{name}.backbone.conv1.weight"
        assert not torch.equal(team.state_dict()[weight], before[weight])


def test_finetuning_starts_from_pretrained_weights_and_keeps_the_leaders(fit_recipe, monkeypatch):
    pretrained = torchvision.models.resnet50()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: pretrained.state_dict())
    team, before = fit_recipe("recipe/finetune")
    after = team.state_dict()
    for prefix, is_trained in {
        "leader": False,
        "teammates.a.backbone": True,
        "teammates.b.backbone": True,
    }.items():
        for name, value in pretrained.named_parameters():
            if not name.startswith("fc."):
                assert torch.equal(before[f"{prefix}.{name}"], value), name
                if value.ndim > 1:
                    assert torch.equal(after[f"{prefix}.{name}"], value) != is_trained, name
    assert team.criterion.ramps(0.01)["leader"] == 1

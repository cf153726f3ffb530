"""Every config that comes with the package is accepted, and runs."""

import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.datasets import write_mnist

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
PARTS = sorted(CONFIGS.glob("*/*.yaml"))


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


# Configs of datasets run in tests/data/test_datasets.py.
@pytest.mark.parametrize("path", [p for p in PARTS if p.parent.name != "data"], ids=name)
def test_each_partial_config_runs(cli, tmp_path, path):
    options = ["--trainer.fast_dev_run", 1]
    if path.parent.name == "team":
        # Made for Fashion-MNIST's size.
        options += ["--data.init_args.image_size", 28, "--data.init_args.batch_size", 4]
    cli(tmp_path, "fit", "--config", path, *options)

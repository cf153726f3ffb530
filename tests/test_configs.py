"""Every config under configs/ is accepted, and those that describe a whole run do run."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
PARTS = sorted(CONFIGS.glob("*/*.yaml"))


def name(path):
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    """A folder with the four files of Fashion-MNIST, of few random images."""
    folder = tmp_path_factory.mktemp("fashion_mnist")
    random = np.random.default_rng(0)
    for split, images in (("train", 400), ("t10k", 100)):
        pixels = random.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        labels = (np.arange(images) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.ndim}i", 2048 + values.ndim, *values.shape)
            with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
    return folder


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
def test_a_run_runs(cli, tmp_path, fashion_mnist, path):
    options = options_for(yaml.safe_load(path.read_text())["data"]["class_path"], fashion_mnist)
    options += ["--trainer.fast_dev_run", 1, "--trainer.accelerator", "cpu"]
    cli(tmp_path, "fit", "--config", path, *options, tiny=False)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_a_part_changes_what_it_says_and_round_trips(cli, capsys, tmp_path, path):
    def printed(*args, **kwargs):
        with pytest.raises(SystemExit) as exit_:
            cli(tmp_path, "fit", *args, "--print_config", **kwargs)
        assert exit_.value.code == 0
        return capsys.readouterr().out

    first = printed("--config", path)
    contains(yaml.safe_load(first), yaml.safe_load(path.read_text()))
    (tmp_path / "printed.yaml").write_text(first)
    assert printed("--config", "printed.yaml", tiny=False) == first


def contains(found, part):
    if isinstance(part, dict):
        for key, value in part.items():
            contains(found[key], value)
    elif isinstance(part, list):
        for one, other in zip(found, part, strict=True):
            contains(one, other)
    else:
        assert found == part or str(found).endswith(f".{part}")


# Those of the data run in tests/data/test_datasets.py.
@pytest.mark.parametrize("path", [p for p in PARTS if p.parent.name != "data"], ids=name)
def test_a_part_runs(cli, tmp_path, path):
    options = ["--trainer.fast_dev_run", 1]
    if path.parent.name == "team":
        # Made for Fashion-MNIST's size.
        options += ["--data.init_args.image_size", 28, "--data.init_args.batch_size", 4]
    cli(tmp_path, "fit", "--config", path, *options)

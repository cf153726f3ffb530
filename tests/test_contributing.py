"""The worked examples in CONTRIBUTING.md run, and do what the page says."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from teamnet_pl.backbones.create import SOURCES
from teamnet_pl.cli import main
from teamnet_pl.deploy import Teammate, export_files
from teamnet_pl.deploy.export.files import FORMATS, describe_formats
from tests.helpers.runs import BEST, saved_config


def examples(page: str) -> dict[str, str]:
    """The code of each worked example, by its heading."""
    pattern = r"^### (.+?)\n.*?^```python\n(.*?)^```"
    return dict(re.findall(pattern, page, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def code(pytestconfig):
    return examples((pytestconfig.rootpath / "CONTRIBUTING.md").read_text())


@pytest.fixture
def my_parts(code, tmp_path, monkeypatch):
    """A module of the user's own in the current folder, with the dataset and the kind."""
    (tmp_path / "my_parts.py").write_text(code["A dataset"] + code["A kind of transfer"])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_parts", None)


def test_there_is_an_example_of_each_in_25_lines(code):
    assert list(code) == [
        "A dataset",
        "A kind of transfer",
        "A source of backbones",
        "An export format",
    ]
    for name, text in code.items():
        lines = [line for line in text.splitlines() if line]
        assert len(lines) <= 25, name


def test_the_dataset_and_the_kind_train_a_team(cli, my_parts):
    options = ["--data", "my_parts.Stripes", "--data.batch_size", 8]
    options += ["--model.cooperation.leader.kind", "my_parts.Cosine", "--trainer.max_epochs", 6]
    options += ["--trainer.limit_train_batches", 20, "--test_after_fit", "true"]
    cli(my_parts, "fit", *options, "--config", "data: {init_args: {train_transform: null}}")
    kind = saved_config(my_parts)["model"]["cooperation"]["leader"]["kind"]
    assert kind == {"class_path": "my_parts.Cosine", "init_args": {"scale": 1.0}}
    rows = json.loads((my_parts / BEST).with_name("per_depth.json").read_text())
    assert {row["accuracy"] for row in rows if row["net"] == "a"} == {1.0}
    teammate = Teammate.from_checkpoint(my_parts / BEST, trust_import=True)
    assert teammate.classes == ["horizontal", "vertical"]


def test_the_source_of_backbones_is_known_by_its_prefix(code, capsys, monkeypatch):
    monkeypatch.setitem(SOURCES, "plain", None)  # which is taken back at the end
    exec(code["A source of backbones"], {})
    main(["blocks", "--backbone", "plain/four", "--input_shape", "[1,8,8]", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["stages"] == [4]
    with pytest.raises(SystemExit):
        main(["blocks", "--backbone", "plain/fuor", "--input_shape", "[1,8,8]"])
    assert "plain/four" in capsys.readouterr().err


def test_the_export_format_saves_each_depth(code, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "numpy", None)  # which is taken back at the end
    exec(code["An export format"], {})
    assert "numpy (weights for numpy.load)" in describe_formats()
    teammate = Teammate.from_checkpoint(checkpoint)
    manifest = export_files(teammate, tmp_path, ["numpy"])
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert len(manifest["depths"]) == 3
    for depth in manifest["depths"]:
        net = teammate.extract(depth["name"]).eval()
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.data.zero_()
        arrays = np.load(tmp_path / depth["files"]["numpy"]["path"])
        net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        with torch.no_grad(), teammate.at(depth["name"]):
            torch.testing.assert_close(net(images), teammate(images))

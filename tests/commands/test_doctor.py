from importlib.metadata import version

import pytest
import torch

from teamnet_pl import Team
from teamnet_pl.cli import main
from teamnet_pl.commands import doctor
from tests.helpers.runs import error_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_extras_are_those_of_the_project(pytestconfig):
    project = (pytestconfig.rootpath / "pyproject.toml").read_text().replace("_", "-")
    extras = doctor.extras()
    assert sorted(extras["onnx"]) == ["onnx", "onnx-ir", "onnxruntime", "onnxscript"]
    assert not {"dev", "test"} & set(extras)
    for extra, libraries in extras.items():
        assert f"\n{extra} = [" in project
        assert all(f'"{library}' in project for library in libraries)


def test_a_machine_that_is_ready(capsys, folder, monkeypatch):
    monkeypatch.setattr(doctor, "extras", lambda: {"here": ["torch"], "gone": ["torch", "no-such"]})
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("torch", "lightning", "timm"):
        assert f"  {name:14}{version(name)}" in lines
    assert f"  {'here':14}installed" in lines
    assert f"  {'gone':14}no no-such: pip install 'teamnet_pl[gone]'" in lines
    assert "  logs can be written" in lines
    assert any(f"{torch.get_num_threads()} threads" in line for line in lines)
    assert any(line.startswith("A step of training and of test passed on ") for line in lines)
    assert lines[-1] == "All is well. To start: teamnet fit --config digits"
    assert not list(folder.iterdir())


def test_what_is_wrong_is_told_last(capsys, folder, monkeypatch):
    (folder / "logs").touch()  # a file in place of the folder, which stops root as well
    monkeypatch.setattr(Team, "training_step", lambda *_: 1 / 0)
    message = error_of(capsys, main, ["doctor"])
    assert f"{folder}/logs cannot be written" in message
    assert "A step of training failed (ZeroDivisionError): division by zero" in message

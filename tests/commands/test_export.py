import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from teamnet_pl.cli import main
from teamnet_pl.deploy import Teammate
from tests.helpers.runs import error_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_from_a_checkpoint_to_files(checkpoint, tmp_path, capsys):
    words = ["--ckpt_path", checkpoint, "--teammate", "b", "--depths", "[5,2]", "--out", tmp_path]
    main(list(map(str, ["export", *words, "--formats", "[safetensors,onnx_int8]"])))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    teammate = Teammate.from_checkpoint(checkpoint, "b")
    assert [depth["name"] for depth in manifest["depths"]] == ["d5", "d2"]
    for depth in manifest["depths"]:
        assert depth["accuracy"] == teammate.accuracy[depth["name"]]
    names = {"d5.safetensors", "d2.safetensors", "d5.int8.onnx", "d2.int8.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"manifest.json"}
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        (line,) = (line for line in lines if name in line)
        assert f"{(tmp_path / name).stat().st_size:,}" in line
    accuracy = manifest["depths"][0]["files"]["onnx_int8"]["test_accuracy"]
    assert any("d5.int8" in line and f"{accuracy:.2%}, from" in line for line in lines)


def test_from_a_folder(checkpoint, tmp_path, capsys):
    teammate = Teammate.from_checkpoint(checkpoint, "b")
    teammate.save_pretrained(tmp_path / "net")
    words = ["export", "--ckpt_path", tmp_path / "net", "--out", tmp_path / "out", "--formats"]
    main(list(map(str, [*words, "[safetensors]"])))
    small = teammate.extract("d2").state_dict()
    saved = load_file(tmp_path / "out/d2.safetensors")
    assert all(torch.equal(weight, small[name]) for name, weight in saved.items())
    message = error_of(capsys, main, list(map(str, [*words, "[onnx_int8]"])))
    assert "Quantization needs data" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "[onnx]", "--depths", "[6]"], "has the depths d7, d"),
        (["--formats", "[onxx]"], "onxx"),
        (["--formats", "[executorch]"], "pip install 'teamnet_pl[executorch]'"),
        (["--formats", "[onnx]", "--teamate", "a"], "Did you mean teammate"),
    ],
)
def test_mistakes_are_reported(checkpoint, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "executorch", None)
    command = ["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path), *words]
    assert message in error_of(capsys, main, command)
    assert list(tmp_path.iterdir()) == []


def test_no_such_checkpoint(tmp_path, capsys):
    command = ["export", "--ckpt_path", "no.ckpt", "--out", str(tmp_path), "--formats", "[onnx]"]
    assert "There is no file no.ckpt" in error_of(capsys, main, command)

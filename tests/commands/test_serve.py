import socket
import sys

import httpx2
import numpy as np
import pytest

from teamnet_pl import TeamNetError
from teamnet_pl.cli import main
from teamnet_pl.commands.serve import serve_teammate
from teamnet_pl.deploy import Predictor, Teammate
from tests.helpers.images import encoded
from tests.helpers.runs import error_of
from tests.helpers.serving import client_of, server_process

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


def test_options_reach_the_server(checkpoint, monkeypatch):
    started = {}

    def run(server, listener):
        started.update(server=server, address=listener.getsockname())

    monkeypatch.setattr("teamnet_pl.deploy.serving.server.run", run)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    make, options = Predictor.from_checkpoint, {}

    def from_checkpoint(*args, **kwargs):
        options.update(kwargs)
        return make(*args, **kwargs)

    monkeypatch.setattr(Predictor, "from_checkpoint", from_checkpoint)
    words = ["--depths", '["d4","d0"]', "--budget_ms", 250, "--port", port, "--max_body_bytes", 3]
    words += ["--max_batch_size", 5]
    main(["serve", "--ckpt_path", str(checkpoint), *map(str, words)])
    assert started["address"] == ("127.0.0.1", port)
    with client_of(started["server"]) as client:
        model = client.get("/model").json()
        assert (list(model["depths"]), model["budget_ms"]) == (["d4", "d0"], 250)
        assert "3 are allowed" in client.post("/predict", content=b"four").json()["error"]
    assert options["batch_sizes"] == (1, 5)


@pytest.mark.slow
def test_a_folder_and_a_repository_as_source(checkpoint, tmp_path, fake_hub):
    """By real processes: all sources answer the same."""
    teammate = Teammate.from_checkpoint(checkpoint, "b")
    teammate.save_pretrained(tmp_path / "net")
    fake_hub.files |= {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", fake_hub.url)
        patch.setenv("HF_HOME", str(tmp_path / "cache"))
        for words in (["me/net"], [tmp_path / "net"], [checkpoint, "--teammate", "b"]):
            with server_process(tmp_path / "log", "--ckpt_path", *words) as (address, _):
                url = f"{address}/predict?depth=d2"
                answers.append(httpx2.post(url, content=encoded(PIXELS)).json())
    expected = Predictor.from_checkpoint(checkpoint, "b").predict(PIXELS, depth="d2")
    for answer in answers:
        assert answer["probabilities"] == pytest.approx(expected.probabilities[0].tolist())
        assert answer["class"] == expected.names[0]


@pytest.mark.fault(
    "a source that is neither a file, nor a folder, nor on the Hub",
    "The server ends with one sentence and status 2.",
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/best.ckpt", "There is no file no/best.ckpt"),
        ("no/such/folder", "There is no file no/such/folder"),
        ("me/net", "There is no file or folder me/net, and as a repository on the Hub: "),
        (".", ". has no config.json of a Teammate"),
    ],
)
def test_a_source_that_is_not_one(tmp_path, monkeypatch, capsys, fake_hub, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake_hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        fake_hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    words = ["serve", "--ckpt_path", source, "--port", "0"]
    assert message in error_of(capsys, main, words)


def test_the_name_of_a_teammate_is_of_a_checkpoint(tmp_path):
    with pytest.raises(TeamNetError, match="holds one Teammate, which has no name; found b"):
        Teammate.load(tmp_path, "b")


@pytest.mark.fault(
    "missing libraries of the extra `serve`", "The error names the extra to install."
)
@pytest.mark.parametrize("name", ["uvicorn", "starlette", "prometheus_client"])
def test_missing_libraries_are_reported(checkpoint, monkeypatch, name):
    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "teamnet_pl.deploy.serving.server")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'teamnet_pl\[serve\]'"):
        serve_teammate(str(checkpoint))


@pytest.mark.fault(
    "a port in use or an unknown host",
    "The command reports it in one sentence and exits with status 2.",
)
@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", None, "cannot listen at 127.0.0.1, port {port}: Address already in use"),
        ("127.0.0.1", 65536, "port must be in 0..65535, found 65536"),
        ("127.0.0.1", -1, "port must be in 0..65535, found -1"),
        ("host.invalid", 0, "The host 'host.invalid' cannot be found"),
        ("a" * 64, 0, "cannot be found"),
        ("192.0.2.1", 0, "cannot listen at 192.0.2.1, port 0: Cannot assign"),
    ],
)
def test_an_address_that_is_not_available(capsys, tmp_path, host, port, message):
    """It is reported before the checkpoint is read, which does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if port is None else port
        words = ["serve", "--ckpt_path", str(tmp_path), "--host", host, "--port", str(port)]
        error = error_of(capsys, main, words)
    assert message.format(port=port) in error


@pytest.mark.fault(
    "a device that the machine does not have",
    "The command reports it in one sentence and exits with status 2.",
)
@pytest.mark.parametrize("command", ["serve", "profile"])
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "mps:7", ""])
def test_a_device_that_is_not_available(checkpoint, capsys, device, command):
    port = ["--port", "0"] if command == "serve" else []
    words = [command, "--ckpt_path", str(checkpoint), "--device", device, *port]
    assert f"The net cannot be put on {device!r}" in error_of(capsys, main, words)

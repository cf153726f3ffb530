"""The endpoints, and a server process that receives hostile requests."""

import asyncio
import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from teamnet_pl import TeamNetError
from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.runtime import predictor as predictor_module
from teamnet_pl.deploy.runtime.predictor import NonFiniteError
from teamnet_pl.deploy.serving import server as module
from teamnet_pl.deploy.serving.batcher import Batcher, OverloadedError
from teamnet_pl.deploy.serving.server import Server
from tests.helpers.images import encoded, hostile_files
from tests.helpers.serving import (
    answer_to,
    client_of,
    ready_app,
    server_process,
    serving_client,
)


def png(seed=0, size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    return encoded(pixels)


def probabilities(team, depth, data):
    """The probabilities of the plain net, for pixels normalized by hand."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).float() / 255
    with torch.no_grad():
        plain = team.teammates["a"].extract(depth).eval()
        return plain((pixels[None, None] - 0.3053) / 0.3760).softmax(-1)[0].tolist()


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor.from_checkpoint(checkpoint)


@pytest.fixture
def client(predictor):
    with serving_client(predictor, budget_ms=5000) as client:
        yield client


def test_each_depth_matches_the_extracted_net(client, team):
    for depth in ("d7", "d4", "d0"):
        content = client.post(f"/predict?depth={depth}", content=png()).json()
        expected = probabilities(team, depth, png())
        assert content["depth"] == depth
        assert content["probabilities"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert content["label"] == int(np.argmax(expected))
        assert content["class"] == str(content["label"])
        assert content["latency_ms"] > content["waited_ms"] >= 0


def test_budgets(client, predictor):
    assert client.post("/predict", content=png()).json()["depth"] == "d7"  # 5 s are plenty
    assert client.post("/predict?budget_ms=1e-6", content=png()).json()["depth"] == "d0"
    macs = predictor.macs["d4"]
    assert client.post(f"/predict?macs={macs}", content=png()).json()["depth"] == "d4"
    assert client.post(f"/predict?macs={macs}&budget_ms=9000", content=png()).status_code == 200


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("budget_ms=0", "budget_ms must be a positive number of milliseconds, found 0.0"),
        ("budget_ms=nan", "must be a positive number"),
        ("budget_ms=fast", "budget_ms must be a number (float), found 'fast'"),
        ("macs=1.5", "macs must be a number (int), found '1.5'"),
        ("macs=1", "shallowest depth takes"),
        ("macs=99999999&depth=d7", "one of macs and depth"),
        ("depth=d9", "depths d7, d4, d0; found d9"),
        ("budget=1", "parameters budget_ms, macs, depth; found budget"),
    ],
)
def test_invalid_queries_are_refused(client, query, message):
    response = client.post(f"/predict?{query}", content=png())
    assert response.status_code == 400
    assert message in response.json()["error"]


@pytest.mark.fault(
    "a request body that is not an image, or a hostile one",
    "The server answers 400 with the reason and keeps running.",
)
def test_bodies_that_are_not_images(client):
    for data in hostile_files().values():
        response = client.post("/predict", content=data)
        assert response.status_code == 400
        assert response.json()["error"].startswith("The image: ")
    response = client.post("/predict", content=png(size=9))
    assert response.status_code == 400
    assert "shape (1, 9, 9)" in response.json()["error"]
    assert client.post("/predict", content=png()).status_code == 200


@pytest.mark.fault(
    "a request body or image that is too large",
    "The server answers 413 or 400 before it decodes the image.",
)
def test_limits(predictor):
    size = len(png())
    with serving_client(predictor, max_body_bytes=size, max_pixels=64) as client:
        assert client.post("/predict", content=png()).status_code == 200
        response = client.post("/predict", content=png() + b"0")
        assert response.status_code == 413
        assert f"{size + 1} bytes; {size} are allowed" in response.json()["error"]
        chunks = iter([png(), b"0"])  # without a Content-Length
        assert client.post("/predict", content=chunks).status_code == 413
    with serving_client(predictor, max_pixels=63) as client:
        response = client.post("/predict", content=png())
        assert response.status_code == 400
        assert "8x8 pixels, 63 are allowed" in response.json()["error"]


def test_no_more_of_a_body_is_kept_than_is_allowed(predictor):
    async def stream():
        for _ in range(10):
            yield bytes(30)

    server = Server(lambda: predictor, max_body_bytes=100)
    body, size = asyncio.run(server._read(SimpleNamespace(stream=stream)))
    assert (len(body), size) == (90, 300)


@pytest.mark.fault(
    "many large images at once", "No more of them are decoded at a time than there are cores."
)
def test_no_more_images_are_decoded_at_once_than_there_are_cores(predictor, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    server = Server(lambda: predictor, budget_ms=60_000)
    decode, now, most = server._image, [], []

    def slow(*args):
        now.append(args)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return decode(*args)

    monkeypatch.setattr(server, "_image", slow)
    with client_of(server) as client, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: client.post("/predict", content=png()), range(8))
        assert {answer.status_code for answer in answers} == {200}
    assert most == [1] * 8


# Forms


def as_form(*contents):
    return [("image", (f"{number}.png", content)) for number, content in enumerate(contents)]


def test_a_form_of_several_images(client, team):
    contents = [png(seed) for seed in range(11)]  # more than one batch
    answer = client.post("/predict?depth=d4", files=as_form(*contents)).json()
    assert answer["latency_ms"] > 0
    assert len(answer["predictions"]) == 11
    for number, (content, prediction) in enumerate(
        zip(contents, answer["predictions"], strict=True)
    ):
        alone = client.post("/predict?depth=d4", content=content).json()
        expected = probabilities(team, "d4", content)
        assert prediction["probabilities"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert prediction["file"] == f"{number}.png"
        for name in ("label", "class", "depth"):
            assert prediction[name] == alone[name]
    metrics = samples(client)
    assert metrics['teamnet_requests_total{status="200"}'] == 12
    assert metrics["teamnet_batch_size_count"] == 22
    assert metrics['teamnet_batch_size_bucket{le="1.0"}'] == 11


def form(*lines):
    body = "\r\n".join(["--b", *lines, "--b--", ""])
    return body.encode(), {"Content-Type": "multipart/form-data; boundary=b"}


FILE = 'Content-Disposition: form-data; name="image"; filename="a.png"'
FIELD = 'Content-Disposition: form-data; name="budget_ms"'


@pytest.mark.fault(
    "a form that is malformed, has a field instead of a file, or a file that is not an image",
    "The server answers 400 and names the file or the field.",
)
@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (*form(FILE, "", "no image"), "a.png: The image: not an image in one of"),
        (*form(FIELD, "", "20"), "the field 'budget_ms', which is not a file"),
        (*form("", "20"), "The form is malformed"),
        (b"--b--\r\n", form()[1], "The form"),
        (form(FILE, "", "x")[0][:-9], form()[1], "malformed: it has no end"),
        (b"", {"Content-Type": "multipart/form-data"}, "malformed: No boundary"),
        (b"\x00" * 99, form()[1], "The form is malformed"),
    ],
)
def test_forms_that_are_wrong(client, body, headers, message):
    response = client.post("/predict", content=body, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]
    assert client.post("/predict", files=as_form(png())).status_code == 200


@pytest.mark.fault(
    "a form with too many files, or too large",
    "The server answers 400 or 413 before it decodes an image.",
)
def test_limits_of_forms(predictor):
    with serving_client(predictor, max_images=2, max_body_bytes=1000) as client:
        assert client.post("/predict", files=as_form(png(), png())).status_code == 200
        response = client.post("/predict", files=as_form(b"no", b"image", b"here"))
        assert response.status_code == 400
        assert response.json() == {"error": "The form has more than 2 files."}
        assert client.post("/predict", files=as_form(bytes(900), b"")).status_code == 413


def test_a_large_file_of_a_form_is_not_written_to_the_disk(predictor, monkeypatch):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    content = png(size=1024) + bytes(2**21)
    with serving_client(predictor, budget_ms=60_000) as client:
        response = client.post("/predict", files=as_form(content))
    assert response.status_code == 400
    assert "shape (1, 1024, 1024)" in response.json()["error"]


def test_other_paths_and_methods(client):
    assert client.get("/nothing").status_code == 404
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing").json() == {"error": "Not Found"}


def test_the_model_is_described(client, predictor):
    response = client.get("/model")
    assert response.status_code == 200
    assert response.json() == {
        "depths": predictor.macs,
        "input_shape": [1, 8, 8],
        "classes": [str(digit) for digit in range(10)],
        "budget_ms": 5000,
    }


def test_a_server_is_alive_before_it_is_ready(predictor):
    may_load = threading.Event()

    def load():
        assert may_load.wait(60)
        return predictor

    server = Server(load)
    with TestClient(server.app()) as client:
        for path, status in {"/livez": 200, "/readyz": 503, "/model": 503}.items():
            assert client.get(path).status_code == status
        assert client.get("/readyz").json() == {"status": "loading"}
        response = client.post("/predict", content=png())
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "not ready" in response.json()["error"]
        may_load.set()
        until = time.monotonic() + 60
        while client.get("/readyz").json() != {"status": "ready"}:
            assert time.monotonic() < until
        assert client.post("/predict", content=png()).status_code == 200
        assert client.get("/livez").json() == {"status": "live"}


def test_no_request_is_the_first_at_a_depth_and_batch_size(predictor, monkeypatch):
    """All have run before, on the same thread."""
    runs, run = [], predictor_module.run_timed

    def recorded(view, images):
        depth = next(name for name, other in predictor._views.items() if other is view)
        runs.append((depth, tuple(images.shape), threading.get_ident()))
        return run(view, images)

    monkeypatch.setattr(predictor_module, "run_timed", recorded)
    with serving_client(predictor, budget_ms=60_000, max_batch_size=3) as client:
        before = set(runs)
        runs.clear()
        with ThreadPoolExecutor(8) as pool:
            for query in ("", "?depth=d4", "?budget_ms=1e-6"):
                paths = [f"/predict{query}"] * 8
                list(pool.map(lambda path: client.post(path, content=png()), paths))
    shapes = {(size, 1, 8, 8) for size in (1, 2, 3)}
    assert {run[:2] for run in before} == {(d, s) for d in predictor.depths for s in shapes}
    assert {depth for depth, *_ in runs} == {"d7", "d4", "d0"}
    assert set(runs) <= before


def test_no_request_reads_the_first_image(predictor, monkeypatch):
    """Pillow imports its plugins for the first image."""
    calls, open_image = [], Image.open

    def recorded(*args, **kwargs):
        calls.append(args)
        return open_image(*args, **kwargs)

    monkeypatch.setattr(Image, "open", recorded)
    with serving_client(predictor):
        assert calls


def samples(client):
    """The metrics as Prometheus reads them."""
    text = client.get("/metrics").text
    return {k: float(v) for k, v in re.findall(r"^([^#\s]+(?:{.*})?) (\S+)$", text, re.MULTILINE)}


def test_metrics(client, predictor):
    for _ in range(3):
        client.post("/predict?depth=d4", content=png())
    client.post("/predict", content=b"no image")
    metrics = samples(client)
    assert metrics['teamnet_requests_total{status="200"}'] == 3
    assert metrics['teamnet_requests_total{status="400"}'] == 1
    assert metrics['teamnet_latency_seconds_count{depth="d4"}'] == 3
    assert 0 < metrics['teamnet_latency_seconds_sum{depth="d4"}'] < 60
    assert metrics["teamnet_batch_size_count"] == 3
    assert metrics["teamnet_waiting"] == 0
    assert metrics["teamnet_last_output_finite"] == 1
    assert metrics["teamnet_slowdown"] == pytest.approx(predictor.controller.slowdown)


@pytest.mark.fault(
    "a net that cannot be loaded, or a dead inference thread",
    "`/readyz` answers 503, and the server ends with the error.",
)
@pytest.mark.parametrize("ends", ["load", "run"])
def test_a_server_without_a_net_ends(predictor, monkeypatch, ends):
    def load():
        if ends == "load":
            raise TeamNetError("no net")
        return predictor

    async def run(_):
        raise TeamNetError("no net")

    monkeypatch.setattr(Batcher, "run", run)
    with TestClient(Server(load).app()) as client:
        until = time.monotonic() + 60
        while (response := client.get("/readyz")).json() != {"status": "failed"}:
            assert time.monotonic() < until
        assert response.status_code == 503
        assert client.post("/predict", content=png()).status_code == 503
        assert client.get("/livez").status_code == 200
    with module.listen("127.0.0.1", 0) as listener, pytest.raises(TeamNetError, match="no net"):
        module.run(Server(load), listener)


@pytest.mark.fault(
    "a net that fails on a batch", "The server answers 500 for that batch and keeps running."
)
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_failing_net_is_a_server_error(client, predictor, monkeypatch, error):
    def run(*_):
        raise error("out of memory")

    monkeypatch.setattr(predictor, "run", run)
    response = client.post("/predict", content=png())
    assert (response.status_code, response.json()) == (
        500,
        {"error": "The server failed; its log has the details."},
    )
    monkeypatch.undo()
    assert client.post("/predict", content=png()).status_code == 200
    assert samples(client)['teamnet_requests_total{status="500"}'] == 1


@pytest.mark.fault(
    "more requests than the shallowest depth can handle",
    "The server answers 503 with `Retry-After`.",
)
def test_overload(client, monkeypatch):
    def refuse(*_):
        raise OverloadedError("too much")

    monkeypatch.setattr("teamnet_pl.deploy.serving.batcher.Batcher.admit", refuse)
    response = client.post("/predict", content=b"no image")  # which is not even decoded
    assert (response.status_code, response.json()) == (503, {"error": "too much"})
    assert response.headers["Retry-After"] == "1"
    assert samples(client)['teamnet_requests_total{status="503"}'] == 1


@pytest.mark.fault(
    "a request body that does not arrive", "The server answers 408 after ten seconds."
)
def test_a_body_that_does_not_arrive(predictor, monkeypatch):
    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.05)

    answer = answer_to(ready_app(predictor), body=None)
    assert answer.status_code == 408
    assert answer.json() == {"error": "The body did not arrive within 0.05 s."}


@pytest.mark.fault("a request body that ends too early", "The server answers 400.")
def test_a_body_that_ends_too_early(predictor):
    answer = answer_to(ready_app(predictor), body=b"P")
    assert (answer.status_code, answer.json()) == (400, {"error": "The body ended too early."})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_ms": 0}, "budget_ms must be a positive"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"max_pixels": -1}, "max_pixels must be at least 1"),
    ],
)
def test_options_out_of_range(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        Server(lambda: predictor, **options)


# Real sockets


@pytest.fixture
def serving(predictor, monkeypatch):
    """Serves in a thread; returns a function that connects to it."""
    servers = []

    class Recorded(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Recorded)
    listener = module.listen("127.0.0.1", 0)
    address = listener.getsockname()
    server = Server(lambda: predictor, budget_ms=60_000)
    thread = threading.Thread(target=module.run, args=(server, listener))
    thread.start()
    until = time.monotonic() + 60
    while server.batcher is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    with contextlib.ExitStack() as connections:
        yield lambda: connections.enter_context(socket.create_connection(address, timeout=30))
    servers[0].should_exit = True
    thread.join(30)
    listener.close()
    assert not thread.is_alive()


def status(connection):
    """The status of the next answer, or None if the connection was closed instead."""
    line = connection.recv(4096).partition(b"\r\n")[0]
    return int(line.split()[1]) if line else None


HEALTH = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
UNFINISHED = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nP"


@pytest.mark.fault(
    "request headers that do not arrive", "The connection is closed after ten seconds."
)
@pytest.mark.parametrize("before", [b"", HEALTH])
def test_headers_that_do_not_arrive(serving, monkeypatch, before):
    monkeypatch.setattr(module, "HEADERS_TIMEOUT_S", 0.5)
    connection = serving()
    if before:
        connection.sendall(before)
        assert status(connection) == 200
    begin = time.monotonic()
    connection.sendall(b"GET /livez HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):  # each byte is in time, but the whole is not
        for _ in range(100):
            connection.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - begin < 4
    other = serving()
    other.sendall(HEALTH)
    assert status(other) == 200


def test_a_silent_connection_is_closed(serving, monkeypatch):
    monkeypatch.setattr(module, "HEADERS_TIMEOUT_S", 0.2)
    assert status(serving()) is None


def test_the_timeout_of_the_headers_ends_with_them(serving, monkeypatch):
    monkeypatch.setattr(module, "HEADERS_TIMEOUT_S", 0.2)
    connection = serving()
    data = png()
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode())
    time.sleep(0.6)
    connection.sendall(data)
    assert status(connection) == 200


@pytest.mark.fault(
    "more requests at once than are allowed", "The server answers 503; `/livez` still answers."
)
def test_health_at_the_limit(serving, monkeypatch):
    monkeypatch.setattr(module, "MAX_REQUESTS", 2)
    waiting = [serving(), serving()]
    for connection in waiting:
        connection.sendall(UNFINISHED)
    until = time.monotonic() + 30
    while True:  # until the server has noticed both
        further = serving()
        further.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        if (refused := status(further)) == 503:
            break
        assert (refused, time.monotonic() < until) == (400, True)
    healthy = serving()
    healthy.sendall(HEALTH)
    assert status(healthy) == 200
    for connection in waiting:
        connection.close()
    while True:
        further = serving()
        further.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        if status(further) == 400:  # there is room again: the empty body is not an image
            break
        assert time.monotonic() < until


# A process


@pytest.fixture(scope="module")
def process(checkpoint, tmp_path_factory):
    """The port, the process and the log file of a server."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--ckpt_path", checkpoint, "--budget_ms", 60000]
    with server_process(log, *words) as (address, server):
        yield int(address.rpartition(":")[2]), server, log


@pytest.mark.fault(
    "requests that are endless or not HTTP", "They are refused, and the server keeps running."
)
@pytest.mark.slow
def test_a_process_survives_hostile_requests(process, team):
    port, server, log = process
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for data in hostile_files().values():
            assert client.post("/predict", content=data).status_code == 400
        assert client.post("/predict", content=bytes(2**25)).status_code == 413
        endless = (bytes(2**16) for _ in range(2**8))  # without a Content-Length
        assert client.post("/predict", content=endless).status_code == 413
    for raw in (
        b"no HTTP\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nshort",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\n" + b"a: " + b"b" * 2**18,
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert answer == b"" or b" 400 " in answer.splitlines()[0]

    images = [png(seed) for seed in range(32)]

    def send(data):
        return httpx2.post(f"http://127.0.0.1:{port}/predict", content=data, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, images))
    assert {answer.status_code for answer in answers} == {200}
    for data, answer in zip(images, answers, strict=True):
        content = answer.json()
        expected = probabilities(team, content["depth"], data)
        assert content["probabilities"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert server.poll() is None
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_page_are_answered(process, pytestconfig, team, tmp_path):
    port = process[0]
    images = {"digit.png": png(), "another.png": png(1)}
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    page = (pytestconfig.rootpath / "docs/deploy.md").read_text()
    commands = re.findall(r"^curl .*127\.0\.0\.1:8000.*$", page, re.MULTILINE)
    answers = []
    for command in commands:
        words = ["-sS", *shlex.split(command.replace(":8000", f":{port}"))[1:]]
        answers.append(json.loads(subprocess.check_output(["curl", *words], cwd=tmp_path)))
    one, form = answers
    predictions = [one, *form["predictions"]]
    for prediction, content in zip(predictions, [png(), png(), png(1)], strict=True):
        expected = probabilities(team, prediction["depth"], content)
        assert prediction["probabilities"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert [prediction["file"] for prediction in predictions[1:]] == list(images)


@pytest.mark.fault(
    "SIGTERM to a server during a request", "The server answers the request and then exits."
)
@pytest.mark.slow
def test_a_process_answers_its_requests_before_it_ends(process):
    """The last test that uses the process."""
    port, server, log = process
    data = png()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"Host: a\r\nExpect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(b"POST /predict HTTP/1.1\r\n" + head.encode())
        assert b" 100 " in connection.recv(4096)  # it waits for the body
        server.send_signal(signal.SIGTERM)
        while "Shutting down" not in log.read_text():
            time.sleep(0.05)
        connection.sendall(data)
        assert b" 200 " in connection.recv(4096).splitlines()[0]
    server.wait(60)


def test_an_output_that_is_not_finite_is_an_error(client, predictor, monkeypatch):
    view = predictor._views["d4"]
    broken = torch.nn.Sequential(view, torch.nn.Threshold(torch.inf, torch.nan))
    monkeypatch.setitem(predictor._views, "d4", broken)
    response = client.post("/predict?depth=d4", content=png())
    assert response.status_code == 500
    assert samples(client)["teamnet_last_output_finite"] == 0
    assert client.get("/readyz").status_code == 200  # an image may be the reason
    with pytest.raises(NonFiniteError, match="output at d4 is not finite"):
        predictor.predict(png(), depth="d4")
    assert client.post("/predict?depth=d7", content=png()).status_code == 200
    assert samples(client)["teamnet_last_output_finite"] == 1

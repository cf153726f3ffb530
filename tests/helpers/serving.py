"""Clients of a server within the process, and server processes.

The clients compare each answer with the description of the endpoints.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.serving.batcher import Batcher
from teamnet_pl.deploy.serving.openapi import description
from teamnet_pl.deploy.serving.server import Server
from tests.helpers.runs import teamnet_command


@contextmanager
def client_of(server: Server) -> Iterator[TestClient]:
    """A client of a server whose net is loaded."""
    with TestClient(server.app(), raise_server_exceptions=False) as client:
        client.event_hooks = {"response": [check_answer]}
        wait_until_ready(client)
        yield client


@contextmanager
def serving_client(predictor: Predictor, **options: Any) -> Iterator[TestClient]:
    """A client of a server with options whose net is loaded."""
    with client_of(Server(lambda: predictor, **options)) as client:
        yield client


def check_answer(answer: httpx2.Response) -> None:
    """Checks that an answer of an endpoint is one that its description allows."""
    content = description()
    operations = content["paths"].get(answer.request.url.path, {})
    operation = operations.get(answer.request.method.lower())
    if operation is None:
        return
    place = f"{answer.request.url.path} {answer.status_code}"
    response = operation["responses"].get(str(answer.status_code))
    assert response is not None, f"{place} is not described"
    if "$ref" in response:
        response = content["components"]["responses"][response["$ref"].rpartition("/")[2]]
    assert set(response.get("headers", {})) <= {name.title() for name in answer.headers}, place
    ((kind, media),) = response["content"].items()
    assert answer.headers["Content-Type"].partition(";")[0] == kind, place
    answer.read()
    if kind == "application/json":
        schema = media["schema"] | {"components": content["components"]}
        errors = list(Draft202012Validator(schema).iter_errors(answer.json()))
        assert not errors, f"{place}: {errors}"


def ready_app(predictor: Predictor) -> Any:
    """The application of a server whose net is loaded, for `answer_to`."""
    server = Server(lambda: predictor)
    server.batcher = Batcher(predictor)
    return server.app()


def answer_to(app: Any, body: bytes | None) -> httpx2.Response:
    """Posts a body to ``/predict`` that does not end.

    Args:
        app: The application.
        body: The beginning of the body, after which the client disconnects; None for a client that
            sends nothing.
    """
    address = httpx2.Request("POST", "http://testserver/predict")
    begin: dict[str, Any] = {"type": "http.request", "body": body, "more_body": True}
    messages = iter([begin])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if body is None:
            await asyncio.sleep(60)
        return next(messages, {"type": "http.disconnect"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
    scope |= {"method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    answer = httpx2.Response(
        sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"], request=address
    )
    check_answer(answer)
    return answer


def wait_until_ready(client: httpx2.Client | TestClient) -> None:
    """Waits until a server predicts."""
    until = time.monotonic() + 120
    while (answer := client.get("/readyz")).status_code != 200:
        assert answer.json() == {"status": "loading"}
        assert time.monotonic() < until
        time.sleep(0.02)


@contextmanager
def server_process(log: Path, *words: object) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs ``teamnet serve`` until its net is loaded; yields its address and the process.

    Args:
        log: A file for what it prints.
        *words: Of the command line.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(teamnet_command("serve", "--port", 0, *words), stderr=file)
    try:
        until = time.monotonic() + 120
        while not (match := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        with httpx2.Client(base_url=match[1]) as client:
            wait_until_ready(client)
        yield match[1], process
    finally:
        process.kill()
        process.wait()

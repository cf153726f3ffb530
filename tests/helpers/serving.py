"""Clients of a server within the process, and server processes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from starlette.testclient import TestClient

from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.serving.server import Server
from tests.helpers.runs import teamnet_command


@contextmanager
def client_of(server: Server) -> Iterator[TestClient]:
    """A client of a server whose net is loaded."""
    with TestClient(server.app(), raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


@contextmanager
def serving_client(predictor: Predictor, **options: Any) -> Iterator[TestClient]:
    """A client of a server with options whose net is loaded."""
    with client_of(Server(lambda: predictor, **options)) as client:
        yield client


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

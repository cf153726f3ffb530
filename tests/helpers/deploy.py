"""Outputs of exported nets, made-up profiles, onnxruntime, and a stand-in for the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teamnet_pl import ElasticNet, TeammateConfig
from teamnet_pl.deploy import Profile, Teammate
from teamnet_pl.deploy.runtime.profile import ProfileRow
from tests.helpers.nets import SHAPE, train

# Nets and their outputs


def make_teammate(config: TeammateConfig, *args: Any) -> Teammate:
    """A Teammate for digits, whose depths all differ, also in the statistics of batch norm.

    Args:
        config: Its config.
        *args: What it knows besides: preprocessing, classes, accuracies and their split.
    """
    teammate = Teammate(10, (1, 8, 8), config, *args)
    train(teammate, batch_size=4)
    return teammate.eval()


def make_images(count: int = 3, seed: int = 0) -> Tensor:
    """Images for `make_elastic`."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def logits_at(net: ElasticNet, depth: Any, batch: Tensor) -> Tensor:
    """The expected logits of an exported depth."""
    with torch.no_grad(), net.at(depth):
        logits: Tensor = net(batch)
    return logits


def profile_row(
    depth: str = "d1",
    batch_size: int = 1,
    median_ms: float = 1.0,
    accuracy: float | None = None,
) -> ProfileRow:
    """A row of a made-up profile."""
    return ProfileRow(depth, [1], 10, 5, batch_size, median_ms, 2 * median_ms, 7, accuracy)


def make_profile(milliseconds: Mapping[str, float]) -> Profile:
    """A made-up profile of the given latency of each depth."""
    rows = [profile_row(depth, median_ms=median_ms) for depth, median_ms in milliseconds.items()]
    return Profile("cpu", "a machine", 1, rows)


# onnxruntime


def onnx_session(path: Path, **options: Any) -> Any:
    """A session of onnxruntime on one thread.

    Args:
        path: The file.
        **options: Of the session.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    session_options = onnxruntime.SessionOptions()
    for name, value in ({"intra_op_num_threads": 1} | options).items():
        setattr(session_options, name, value)
    return onnxruntime.InferenceSession(
        str(path), session_options, providers=["CPUExecutionProvider"]
    )


def run_onnx(path: Any, batch: Tensor, **inputs: Any) -> Tensor:
    """The logits that onnxruntime computes.

    Args:
        path: The file, or a session.
        batch: Images.
        **inputs: Other inputs of the net.
    """
    session = path if hasattr(path, "run") else onnx_session(path)
    arrays = {"images": batch.numpy()} | {name: np.array(value) for name, value in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


# The Hugging Face Hub


class FakeHub(ThreadingHTTPServer):
    """A server on this machine that can do as much of the Hub as a push and a pull need.

    Attributes:
        url: Its address.
        files: The pushed files by their path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}


class _HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size) if size else self._chunks()
        if self.path == "/api/repos/create":
            repository = json.loads(body)
            name = f"{repository.get('organization', 'me')}/{repository['name']}"
            self._answer({"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            regular = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self._answer({"files": regular})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.url}/{repository}/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40})
        else:
            self.send_error(404)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

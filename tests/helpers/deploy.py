"""Small trained elastic nets, onnxruntime, a stand-in for the Hub, and hostile image files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import zlib
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from teamnet_pl import ElasticNet
from tests.helpers.nets import train

# Elastic nets

SHAPE = (3, 32, 32)
"""The shape of an image of the nets above."""


def make_elastic(backbone: nn.Module, depths: Any, **kwargs: Any) -> ElasticNet:
    """A net whose depths all differ, also in the statistics of their batch norms."""
    net = ElasticNet(backbone, SHAPE, depths=depths, **kwargs)
    train(net, batch_size=4)
    return net.eval()


def make_images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def logits_at(net: ElasticNet, depth: Any, batch: Tensor) -> Tensor:
    """The expected logits of an exported depth."""
    with torch.no_grad(), net.at(depth):
        logits: Tensor = net(batch)
    return logits


# onnxruntime


def onnx_session(path: Path, **options: Any) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    session_options = onnxruntime.SessionOptions()
    for name, value in ({"intra_op_num_threads": 1} | options).items():
        setattr(session_options, name, value)
    return onnxruntime.InferenceSession(
        str(path), session_options, providers=["CPUExecutionProvider"]
    )


def run_onnx(path: Any, batch: Tensor, **inputs: Any) -> Tensor:
    """Logits that onnxruntime computes, from a path or a session."""
    session = path if hasattr(path, "run") else onnx_session(path)
    arrays = {"images": batch.numpy()} | {name: np.array(value) for name, value in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


# The Hugging Face Hub


class FakeHub(ThreadingHTTPServer):
    """A server on this machine that does as much of the Hub as a push and a pull need.

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


# Image files


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def hostile_files() -> dict[str, bytes]:
    """Contents of files that are damaged, too large or not images, by a name."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    png, jpeg = encoded(picture, "PNG"), encoded(picture, "JPEG")
    return {
        "nothing": b"",
        "text": b"no image",
        "zeros": bytes(1000),
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(rm) run\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "header": png[:20],
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "damaged png": png[:200] + b"\0" * 100 + png[300:],
        "bomb": _bomb(60_000),
        "large": _bomb(4097),
    }


def _bomb(side: int) -> bytes:
    """A PNG whose header claims a large image, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )

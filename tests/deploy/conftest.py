"""Small elastic nets as if trained, what runs them outside of torch, a hub, files to choke on."""

import base64
import hashlib
import io
import json
import struct
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from PIL import Image

from teamnet_pl import ElasticNet, Team
from teamnet_pl.backbones import CifarResNet
from tests.helpers.teams import make_digits

SHAPE = (3, 32, 32)


def resnet(layers):
    return tv.ResNet(tv.resnet.Bottleneck, layers, num_classes=5, groups=4, width_per_group=2)


def convnext(layers):
    return timm.models.ConvNeXt(depths=layers, dims=(8, 12, 16, 20), num_classes=5)


def vit(layers):
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=layers, num_heads=2, num_classes=5
    )


def cifar(width, layers=20):
    return CifarResNet(layers, num_classes=5, in_channels=3, width=width)


def elastic(backbone, depths, **kwargs) -> ElasticNet:
    """A net at all depths that differ, its batch norms' statistics too."""
    net = ElasticNet(backbone, SHAPE, depths=depths, **kwargs)
    train(net)
    return net


def train(net):
    """Two steps, after which every depth has statistics of its own."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for seed in range(2):
        images = torch.randn(4, *net.input_shape, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net.train().packed(images).square().mean().backward()
        optimizer.step()
    net.eval()


def images(count=3, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def logits_at(net, depth, batch):
    """The truth."""
    with torch.no_grad(), net.at(depth):
        return net(batch)


def onnx_session(path, **changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    for name, value in ({"intra_op_num_threads": 1} | changes).items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path, batch, **inputs):
    """Logits that onnxruntime computes; a path or a session."""
    session = path if hasattr(path, "run") else onnx_session(path)
    arrays = {"images": batch.numpy()} | {k: np.array(v) for k, v in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


@pytest.fixture(scope="session")
def nets():
    """What is in this file, for the tests beside it."""
    return SimpleNamespace(
        cifar=cifar,
        convnext=convnext,
        elastic=elastic,
        images=images,
        logits_at=logits_at,
        onnx_session=onnx_session,
        resnet=resnet,
        run_onnx=run_onnx,
        train=train,
        vit=vit,
    )


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a push and a pull need."""

    def do_POST(self):
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size) if size else self._chunks()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization', 'me')}/{wanted['name']}"
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

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self):
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

    def _answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def fake_hub():
    """A server on this machine, with its ``url`` and the ``files`` that are pushed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def team(checkpoint):
    return Team.load_from_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def digits():
    """The test split: raw images, uint8 or float arrays as the data has them, and its batches."""
    data = make_digits()
    data.setup("test")
    return data


def bomb(side):
    """A PNG that says it is large, with next to nothing in it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="session")
def hostile():
    """Files to choke on, by name."""
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
        "bomb": bomb(60_000),
        "large": bomb(4097),
    }


def encoded(image, format):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()

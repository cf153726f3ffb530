"""A team from a checkpoint, and files to choke on."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from teamnet_pl import Team


@pytest.fixture(scope="session")
def team(checkpoint):
    return Team.load_from_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def digits(tiny):
    """The test split: raw images, uint8 or float arrays as the data has them, and its batches."""
    data = tiny.digits()
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

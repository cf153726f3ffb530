"""Noise, image files, and hostile image files."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image


def pixels(count: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, (count, size, size, channels) or without channels if grey."""
    shape = (count, size, size) + ((channels,) if channels > 1 else ())
    return np.random.default_rng([seed, count, size]).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The content of an image file."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


@cache
def hostile_files() -> dict[str, bytes]:
    """Contents of files that are damaged, too large or not images, by a name."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
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

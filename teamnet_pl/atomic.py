"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces an old one when it is complete.

    The new file is written beside the old one, to ``.<name>.tmp``, and renamed when its content is
    on the disk. Any failure before that, even a killed process, leaves the old file unchanged. A
    temporary file left by a killed process is overwritten by the next one.

    Args:
        path: The file; missing folders are made.

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise, a power failure may lose the name
        finally:
            os.close(folder)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes a text file that replaces an old one when it is complete; see `atomic_write`.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(text.encode())

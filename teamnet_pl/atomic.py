"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of another once it is whole.

    It is written beside the other, to ``.<name>.tmp``, and renamed when its content is on the disk.
    Whatever happens before, a kill included, leaves the other as it was; a temporary file that a
    kill left behind is overwritten by the next one.

    Args:
        path: The file.

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: If it cannot be written.
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
            os.fsync(folder)  # or the name may be lost in a power failure
        finally:
            os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that takes the place of another once it is whole.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())

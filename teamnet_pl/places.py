"""Names of the files that results go to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path


def numbered_names(path: Path) -> Iterator[Path]:
    """Yields a file's name, and then the same with the numbers 2, 3 and so on before its ending."""
    yield path
    for number in count(2):
        yield path.with_stem(f"{path.stem}_{number}")


def free_name(path: Path) -> Path:
    """Returns the first of the `numbered_names` that is not in use."""
    return next(name for name in numbered_names(path) if not name.exists())


def short_path(path: str | Path) -> str:
    """Returns a path relative to the current folder if it is in there, for messages."""
    absolute = Path(path).absolute()
    in_folder = absolute.is_relative_to(Path.cwd())
    return os.path.relpath(absolute) if in_folder else str(path)

"""Fixtures of the tests of data modules."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.datasets import DatasetWriter, FileServer


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetWriter:
    """Writes datasets to a new folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return DatasetWriter(folder, monkeypatch)


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """Serves folders over HTTP."""
    server = FileServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield server
    server.stop()

"""Fixtures of the tests of data modules."""

import pytest

from tests.helpers.datasets import DatasetWriter, FileServer


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Writes datasets to a new folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return DatasetWriter(folder, monkeypatch)


@pytest.fixture
def file_server():
    """Serves folders by HTTP."""
    server = FileServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield server
    server.stop()

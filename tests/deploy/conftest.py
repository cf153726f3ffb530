"""Fixtures of the tests of deploy."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from teamnet_pl import Team
from teamnet_pl.data import Digits
from tests.helpers.deploy import FakeHub
from tests.helpers.teams import make_digits


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """A stand-in for the Hugging Face Hub that runs during the test."""
    server = FakeHub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def team(checkpoint: Path) -> Team:
    """The team in the checkpoint."""
    return Team.load_from_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Digits with the test split set up."""
    data = make_digits()
    data.setup("test")
    return data

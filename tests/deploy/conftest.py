"""Fixtures of the tests of deploy."""

from pathlib import Path

import pytest

from teamnet_pl import Team
from teamnet_pl.data import Digits
from tests.helpers.teams import make_digits


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

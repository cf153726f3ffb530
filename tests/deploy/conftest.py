"""A checkpoint as `teamnet fit` leaves it."""

import pytest

from teamnet_pl import Team


@pytest.fixture(scope="session")
def checkpoint(cli, tmp_path_factory):
    """Its depths have statistics of their own; per_depth.json lies beside it."""
    folder = tmp_path_factory.mktemp("fitted")
    cli(folder, "fit", "--test_after_fit", "true")
    return folder / "logs/version_0/checkpoints/best.ckpt"


@pytest.fixture(scope="session")
def team(checkpoint):
    return Team.load_from_checkpoint(checkpoint).eval()


@pytest.fixture(scope="session")
def digits(tiny):
    """The test split: raw images, uint8 or float arrays as the data has them, and its batches."""
    data = tiny.digits()
    data.setup("test")
    return data

"""Fixtures of all tests."""

import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import settings

from tests.helpers.deploy import FakeHub
from tests.helpers.runs import BEST, OWN_NETS, TINY, CommandLine

# A slow example on a busy machine is not a failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny nets are slower on more threads, and much slower where processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for subprocesses
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_open_wandb_run() -> Iterator[None]:
    """A run that a test leaves open would go on in the next one, with its settings."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
        wandb.teardown()


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The command line, on tiny nets."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(TINY)
    return CommandLine(config)


@pytest.fixture(scope="session")
def checkpoint(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `teamnet fit`, with per_depth.json of the test split beside it."""
    folder = tmp_path_factory.mktemp("fitted")
    cli(folder, "fit", "--test_after_fit", "true")
    return folder / BEST


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
def own_nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on Python's path with a user's own module, ``own_nets``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(OWN_NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_nets", None)

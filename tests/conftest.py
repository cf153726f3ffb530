"""Fixtures of all tests."""

import sys

import pytest
import torch

from teamnet_pl.cli import main
from tests.helpers.runs import OWN_NETS, TINY


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny nets are slower on more, and much slower where processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for subprocesses
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    """Runs the command line in a folder of its own, on tiny nets unless told otherwise."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(TINY)

    def run(folder, subcommand, *args, tiny=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main([subcommand, *(["--config", str(config)] if tiny else []), *map(str, args)])

    run.config = config
    return run


@pytest.fixture(scope="session")
def checkpoint(cli, tmp_path_factory):
    """As `teamnet fit` leaves it: depths have their own statistics, per_depth.json lies beside."""
    folder = tmp_path_factory.mktemp("fitted")
    cli(folder, "fit", "--test_after_fit", "true")
    return folder / "logs/version_0/checkpoints/best.ckpt"


@pytest.fixture(scope="session")
def own_nets(tmp_path_factory):
    """Folder with a module ``own_nets``, on Python's path, as a user has one."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(OWN_NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_nets", None)

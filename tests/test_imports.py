"""What can be answered without the large libraries is answered before they are imported."""

from __future__ import annotations

import pytest

from teamnet_pl.cli.spelling import GROUPS, TRAINING
from teamnet_pl.cli.training import TeamCLI, run_training
from tests.helpers.imports import packages_after

LARGE = {"jsonargparse", "lightning", "matplotlib", "rich", "timm", "torch", "wandb"}


def test_the_package_loads_no_large_library():
    assert not packages_after("import teamnet_pl") & LARGE


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        ([], 2),
        (["fti"], 2),
        (["fit", "--modle.x", "1"], 2),
        (["fit", "--config", "digist"], 2),
    ],
)
def test_an_answer_loads_no_large_library(words, exit_code):
    code = f"from teamnet_pl.cli import main\nmain({words})"
    assert not packages_after(code, exit_code) & LARGE


@pytest.fixture(scope="module")
def parsers():
    """The parsers of LightningCLI's subcommands by name, and that of the command line as ``""``."""
    built = {}

    def keep(cli, parser, _args):
        built.update({"": parser} | cli._subcommand_parsers)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeamCLI, "parse_arguments", keep)
        with pytest.raises(InterruptedError):
            run_training([])
    return built


def test_the_subcommands_that_are_known_in_advance_are_those_of_the_parser(parsers):
    assert {"", *TRAINING} == parsers.keys()


def test_the_groups_that_are_known_in_advance_are_those_of_the_parsers(parsers):
    options = {name for parser in parsers.values() for name in parser._option_string_actions}
    assert set(GROUPS) == {name.lstrip("-").partition(".")[0].rstrip("+") for name in options}
    assert list(GROUPS) == sorted(set(GROUPS))


def test_a_logger_whose_library_is_missing_is_refused_in_one_sentence(
    cli, tmp_path, capsys, monkeypatch
):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(SystemExit) as stop:
        cli(tmp_path, "fit", "--config", "logger/tensorboard")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "error: Neither `tensorboard` nor `tensorboardX` is available." in message
    assert "Subtypes" not in message

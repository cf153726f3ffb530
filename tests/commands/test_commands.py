import inspect
import subprocess
import sys

import pytest

from teamnet_pl.cli import main
from teamnet_pl.commands import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_is_the_first_line_of_the_docstring(name):
    function = COMMANDS[name].load()
    assert COMMANDS[name].summary == inspect.getdoc(function).partition("\n")[0]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.summary}" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert COMMANDS[name].summary in " ".join(capsys.readouterr().out.split())


def test_importing_the_commands_imports_nothing_else():
    script = """
import sys
import teamnet_pl
before = set(sys.modules)
import teamnet_pl.commands
print(*set(sys.modules) - before)
"""
    imported = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    standard = sys.stdlib_module_names
    assert [name for name in imported if name.partition(".")[0] not in standard] == [
        "teamnet_pl.commands"
    ]

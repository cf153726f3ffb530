"""The command line, ``teamnet``.

This front needs neither Lightning nor torch, which take seconds to import: it answers at once where
it can.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from teamnet_pl import __version__
from teamnet_pl.cli.overview import overview
from teamnet_pl.cli.refusals import check_complete
from teamnet_pl.cli.spelling import check_spelling, with_data_names
from teamnet_pl.cli.words import with_config_files
from teamnet_pl.commands import COMMANDS
from teamnet_pl.errors import TeamNetError


def main(args: list[str] | dict[str, Any] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Its words, by default those that the process was started with; or the values of a
            training, as LightningCLI takes them.
    """
    words = sys.argv[1:] if args is None else args
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there stands in for a library
    if not isinstance(words, list):
        from teamnet_pl.cli.training import run_training

        run_training(words)
        return
    if words == ["--version"]:
        print(f"teamnet {__version__}")
        sys.exit(0)
    if words in ([], ["-h"], ["--help"], ["help"]):
        print(overview())
        sys.exit(0 if words else 2)
    has_images = any(word.partition("=")[0] == "--images" for word in words)
    name = "predict --images" if words[0] == "predict" and has_images else words[0]
    try:
        words = with_config_files(words)
        if name not in COMMANDS:
            check_spelling(words)
            words = with_data_names(words)
            check_complete(words)
    except TeamNetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if name in COMMANDS:
        from teamnet_pl.cli.parser import run_command

        run_command(name, words[1:])
    else:
        from teamnet_pl.cli.training import run_training

        run_training(words)

"""The command line's own subcommands.

Each is a function whose arguments are the options. Its module, and the libraries that it needs, are
imported only when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        path: Import path of its function, ``module:name``.
        summary: The first line of the function's docstring.
    """

    path: str
    summary: str

    def load(self) -> Callable[..., None]:
        """Imports the function."""
        module, _, name = self.path.partition(":")
        function: Callable[..., None] = getattr(import_module(module), name)
        return function


COMMANDS = {
    "blocks": Command(
        "teamnet_pl.commands.blocks:show_blocks",
        "Prints a backbone's skippable blocks and the cost of each policy's depths.",
    ),
    "configs": Command(
        "teamnet_pl.commands.configs:list_configs",
        "Lists the configs that ``--config`` takes by name.",
    ),
    "profile": Command(
        "teamnet_pl.commands.profile:profile_teammate",
        "Measures the latency and memory of each depth of a Teammate on this machine.",
    ),
    "serve": Command(
        "teamnet_pl.commands.serve:serve_teammate",
        "Serves a Teammate's predictions over HTTP, each within a budget of time.",
    ),
    "predict --images": Command(
        "teamnet_pl.commands.predict:predict_images",
        "Writes the class of each image in files or folders, with probabilities.",
    ),
    "export": Command(
        "teamnet_pl.commands.export:export_teammate",
        "Exports a Teammate to files for other programs, with a manifest of its depths.",
    ),
    "doctor": Command(
        "teamnet_pl.commands.doctor:check_machine",
        "Tells versions, devices and optional libraries, and tries a step of training.",
    ),
}
"""The subcommands by name."""

__all__ = ["COMMANDS", "Command"]

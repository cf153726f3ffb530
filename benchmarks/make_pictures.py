"""Draws the pictures in docs/ from benchmarks/results/, without measuring again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import load
import stress
from harness import RESULTS, load_result
from matplotlib.figure import Figure

from teamnet_pl.cooperation.report import Report
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.runtime.profile_report import draw_profile

PICTURES: dict[str, Callable[[Path], Figure]] = {
    "digits": lambda path: Report.load(path).figure(),
    "load": lambda path: load.draw(load_result(path)),
    "profile": lambda path: draw_profile(Profile.load(path)),
    "stress": lambda path: stress.draw(load_result(path)),
}
"""How each picture is drawn from the result file of the same name."""


def main() -> None:
    """Draws all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    for name, draw in PICTURES.items():
        draw(RESULTS / f"{name}.json").savefig(args.folder / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()

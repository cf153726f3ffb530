"""Draws the figures of the documentation: ``python docs/draw_figures.py`` writes ``docs/figures/``.

Depths, policies and transfers are those of the package, so that a figure cannot say otherwise. The
colors are those of Okabe and Ito, which color-blind people can tell apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from teamnet_pl.cooperation import Cooperation
from teamnet_pl.elastic import Depth, DepthPolicy, derive_depths

STAGES = (3, 2, 2)
"""Blocks that can be skipped in each stage of the default Teammate."""
STAGE_COLORS = ("#0072B2", "#009E73", "#D55E00")
TRANSFER_COLORS = {"leader": "#0072B2", "peer": "#D55E00", "sub_networks": "#009E73"}
GREY, INK = "#b8b8b8", "#222222"


def canvas(width: float, height: float) -> Axes:
    """Makes a white picture whose units are those of its size in inches."""
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, **style: object
) -> None:
    """Draws a box with round corners around a point."""
    options = {"facecolor": color, "edgecolor": "none", "linewidth": 1.2} | style
    shape = "round,pad=0,rounding_size=0.06"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, **options))


def text(axes: Axes, x: float, y: float, words: str, size: float = 10, **style: object) -> None:
    """Writes words, in the middle of a point unless told otherwise."""
    options = {"ha": "center", "va": "center", "color": INK} | style
    axes.text(x, y, words, fontsize=size, **options)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0
) -> None:
    """Draws an arrow from one point to another."""
    curve = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, linewidth=1.3, color=color,
            connectionstyle=curve, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw_team() -> None:
    """Draws who teaches whom in the default team."""
    cooperation = Cooperation()
    axes = canvas(8, 4.9)
    box(axes, 4, 4.5, 2.2, 0.5, GREY)
    text(axes, 4, 4.5, "Leader", 12, weight="bold")
    rows = (3.25, 2.6, 1.95, 1.3)
    depths = {"a": derive_depths(STAGES, 4), "b": derive_depths(STAGES, 4, interleaved=True)}
    columns = {"a": 2.0, "b": 6.0}
    for name, x in columns.items():
        side = -1 if name == "a" else 1
        text(axes, x + side * 1.1, 3.75, f"Teammate {name}", 11, weight="bold")
        for row, depth in zip(rows, depths[name], strict=True):
            draw_blocks(axes, x, row, depth)
            text(axes, x + side * 1.5, row, depth.name, 10)
            # The Leader teaches each depth, from the inner side.
            arrow(
                axes,
                (4 + side * 0.6, 4.22),
                (x - side * 0.78, row + 0.1),
                TRANSFER_COLORS["leader"],
            )
        for row in rows[1:]:
            start, end = (x + side * 0.8, rows[0] - 0.1), (x + side * 0.8, row)
            arrow(axes, start, end, TRANSFER_COLORS["sub_networks"], bend=side * -0.3)
        other = columns["b" if name == "a" else "a"]
        for row in rows:
            start, end = (x - side * 0.78, rows[0] - 0.1), (other + side * 0.78, row - 0.08)
            arrow(axes, start, end, TRANSFER_COLORS["peer"])
    words = {
        "leader": "the Leader teaches every depth",
        "peer": "the other Teammate's deepest depth teaches every depth",
        "sub_networks": "the deepest depth teaches the others of its Teammate",
    }
    for y, (name, line) in zip((0.75, 0.48, 0.21), words.items(), strict=True):
        line = f"{line}, weight {getattr(cooperation, name).weight:g}"
        text(axes, 4, y, line, 9.5, color=TRANSFER_COLORS[name], weight="bold")


def draw_blocks(axes: Axes, x: float, y: float, depth: Depth, width: float = 0.17) -> None:
    """Draws the blocks of a depth in a row: filled if they run, hollow if they are skipped."""
    stages = [stage for stage, count in enumerate(STAGES) for _ in range(count)]
    left = x - (len(stages) - 1) * (width + 0.03) / 2
    for index, (stage, kept) in enumerate(zip(stages, depth.kept, strict=True)):
        color = STAGE_COLORS[stage]
        style = {} if kept else {"facecolor": "white", "edgecolor": color, "linestyle": ":"}
        box(axes, left + index * (width + 0.03), y, width, 0.32, color, **style)


def draw_policies() -> None:
    """Draws the blocks that each depth keeps, by each policy."""
    axes = canvas(8, 4.2)
    policies = sorted(get_args(DepthPolicy), key=lambda policy: policy != "last_stage_first")
    for index, policy in enumerate(policies):
        x, top = 2.2 + 4 * (index % 2), 3.95 - 1.95 * (index // 2)
        text(axes, x, top, policy, 10.5, family="monospace", weight="bold")
        for row, depth in enumerate(derive_depths(STAGES, 4, policy)):
            y = top - 0.34 - 0.38 * row
            draw_blocks(axes, x, y, depth, 0.26)
            text(axes, x - 1.25, y, depth.name, 9.5)
    text(axes, 4, 0.13, "filled: the block runs    dotted: it is skipped    colors: stages", 8.5)


def draw_packed() -> None:
    """Draws the packed forward as a tree: depths share what comes before their first difference."""
    depths = derive_depths(STAGES, 4)
    axes = canvas(8, 3.4)
    rows = {depth.name: 2.7 - 0.65 * index for index, depth in enumerate(depths)}
    steps = [("stem", None)]
    for stage, count in enumerate(STAGES):
        steps += [("", stage)] * count
        steps.append(("down" if stage < len(STAGES) - 1 else "head", None))
    spacing = 6.4 / (len(steps) - 1)
    position, block = [0.6 + spacing * index for index in range(len(steps))], 0
    prefixes: dict[str, tuple[bool, ...]] = {depth.name: () for depth in depths}
    previous: dict[tuple[bool, ...], float] = {}
    for x, (word, stage) in zip(position, steps, strict=True):
        parents = dict(prefixes)
        if stage is not None:
            prefixes = {d.name: (*prefixes[d.name], d.kept[block]) for d in depths}
            block += 1
        # A stream for each distinct prefix, in the row of its deepest depth.
        streams: dict[tuple[bool, ...], str] = {}
        for depth in depths:
            streams.setdefault(prefixes[depth.name], depth.name)
        for prefix, name in streams.items():
            y = rows[name]
            if previous:
                start = previous[parents[name]]
                axes.plot(
                    [x - spacing, x - spacing * 0.45, x], [start, y, y], color=INK, lw=1.3, zorder=0
                )
            runs = stage is None or prefix[-1]
            if runs:
                box(axes, x, y, 0.36, 0.36, GREY if stage is None else STAGE_COLORS[stage])
        for prefix, name in streams.items():
            previous[prefix] = rows[name]
        text(axes, x, 3.12, word, 8.5)
        text(axes, x, 0.28, f"{len(streams)}", 9.5, weight="bold")
    for depth in depths:
        text(axes, 7.45, rows[depth.name], depth.name, 10, weight="bold")
    text(axes, 4, 0.07, "streams of the batch at each layer", 8.5)


FIGURES = {"team": draw_team, "policies": draw_policies, "packed": draw_packed}


def main() -> None:
    """Writes all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    # The same bytes each time, and letters as outlines, which look alike everywhere.
    plt.rcParams.update({"svg.hashsalt": "teamnet", "font.family": "DejaVu Sans"})
    for name, draw in FIGURES.items():
        draw()
        plt.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close()


if __name__ == "__main__":
    main()

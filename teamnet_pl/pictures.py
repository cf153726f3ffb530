"""The look of all pictures: colors, markers, labels and units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colors that also differ for the color-blind.

Source: Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is faint on white.
"""
MARKERS = "os^DvP*X<p>"
_PLACES = (  # offset of a label from its point in points, and its alignment
    (4, 4, "left", "bottom"),
    (-4, 4, "right", "bottom"),
    (4, -4, "left", "top"),
    (-4, -4, "right", "top"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
)


class Label(NamedTuple):
    """The name of a point.

    Attributes:
        x: Position of the point along the x-axis.
        y: Position of the point along the y-axis.
        text: The name.
        color: Color of the name.
    """

    x: float
    y: float
    text: str
    color: str


def series_style(index: int) -> dict[str, Any]:
    """Returns the color and the marker of a series, by its number; 77 of them differ."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def label_macs(axes: Axes) -> None:
    """Labels an x-axis of multiply-accumulates, with k, M or G at its numbers."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("multiply-accumulates (MACs) per image")


def label_points(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes names beside points, inside the frame, so that none covers another name or a point.

    A name for which there is no such place is left out.

    Args:
        axes: The axes, complete but for the names.
        labels: All names, the most important first.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # gives the axes their place
    frame = axes.get_window_extent()
    points = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    taken = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for line in points for x, y in line]
    for label in labels:
        for right, up, horizontal, vertical in _PLACES:
            text = axes.annotate(
                label.text, (label.x, label.y), (right, up), textcoords="offset points",
                ha=horizontal, va=vertical, fontsize=8, color=label.color,
            )  # fmt: skip
            box = text.get_window_extent().padded(1)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def add_legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend above all axes, where it covers nothing."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))

"""A profile as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teamnet_pl.deploy.runtime.profile import Profile, ProfileRow
from teamnet_pl.elastic.depths import format_stages
from teamnet_pl.pictures import Label, add_legend, label_points, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

HEADER = "depth", "blocks", "MACs, M", "batch", "median, ms", "p95, ms", "peak, MiB", "accuracy"


def profile_lines(profile: Profile) -> list[tuple[str, ...]]:
    """Formats the rows of a profile for a table with `HEADER`."""
    return [
        (
            row.depth,
            format_stages(row.blocks_per_stage),
            f"{row.macs / 1e6:.3f}",
            str(row.batch_size),
            f"{row.median_ms:.2f}",
            f"{row.p95_ms:.2f}",
            f"{row.peak_bytes / 2**20:.2f}",
            "" if row.accuracy is None else f"{row.accuracy:.2%}",
        )
        for row in profile.rows
    ]


def profile_table(profile: Profile) -> Table:
    """Makes a table of a profile to print with rich."""
    from rich.table import Table

    table = Table(*HEADER, title=f"{profile.machine}, threads: {profile.threads}")
    for line in profile_lines(profile):
        table.add_row(*line)
    return table


def pareto_front(rows: Sequence[ProfileRow]) -> list[ProfileRow]:
    """Selects the rows worth choosing: no other row is both as fast and as accurate.

    Args:
        rows: Rows of one batch size with accuracies.

    Returns:
        The front, the fastest row first, each row more accurate than those before it.
    """
    front: list[ProfileRow] = []
    for row in sorted(rows, key=lambda row: (row.median_ms, -(row.accuracy or 0))):
        if not front or (row.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(row)
    return front


def draw_profile(profile: Profile) -> Figure:
    """Draws accuracy against latency for each batch size, with the Pareto front as a line."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row.batch_size for row in profile.rows))
    figure = Figure(figsize=(4.5 * len(sizes), 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        rows = [row for row in profile.rows if row.batch_size == size and row.accuracy is not None]
        front = pareto_front(rows)
        axes.plot(*_points(front), label="Pareto front", **series_style(0))
        dominated = [row for row in rows if row not in front]
        axes.plot(*_points(dominated), ls="", label="dominated", **series_style(1))
        axes.set_xlabel("median latency, ms")
        axes.set_title(f"batch of {size}")
        axes.grid(alpha=0.3)
        axes.margins(0.08)  # room for the names of the points at the edges
    panels[0].set_ylabel(f"top-1 accuracy on the {profile.split} split, %")
    add_legend(figure, panels[0])
    for axes, size in zip(panels, sizes, strict=True):
        rows = [row for row in profile.rows if row.batch_size == size and row.accuracy is not None]
        points = zip(*_points(rows), (row.depth for row in rows), strict=True)
        label_points(axes, [Label(*point, color="black") for point in points])
    return figure


def _points(rows: Sequence[ProfileRow]) -> tuple[list[float], list[float]]:
    return [row.median_ms for row in rows], [100 * (row.accuracy or 0) for row in rows]

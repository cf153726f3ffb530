"""Pictures can be read: by the color-blind, with many depths, and with units."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from colorspacious import cspace_convert, deltaE
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from teamnet_pl.cooperation.report import Report, ReportRow
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.runtime.profile_report import draw_profile
from teamnet_pl.pictures import COLORS, MARKERS, label_macs, series_style
from tests.helpers.deploy import profile_row


@pytest.mark.parametrize("kind", [None, "deuteranomaly", "protanomaly", "tritanomaly"])
def test_colors_differ_also_for_the_color_blind(kind):
    """By the difference of colors in CAM02-UCS, of which about 2 can just be seen."""
    colors = np.array([to_rgb(color) for color in COLORS])
    if kind is not None:
        space = {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 100}
        colors = np.clip(cspace_convert(colors, space, "sRGB1"), 0, 1)
    for one, other in combinations([*colors, np.ones(3)], 2):
        assert deltaE(one, other, input_space="sRGB1") > 10


def test_series_differ_in_color_or_marker():
    styles = [tuple(series_style(index).values()) for index in range(77)]
    assert len(set(styles)) == 77
    assert len({style[0] for style in styles[: len(COLORS)]}) == len(COLORS)
    assert len({style[1] for style in styles[: len(MARKERS)]}) == len(MARKERS)


def report(depths: int, spread: float) -> Report:
    def row(net: str, macs: int, accuracy: float, depth: str | None = None) -> ReportRow:
        return ReportRow("test", net, depth, None, macs, 1, accuracy, None, 1.0, 0.1)

    rows = [row("leader", 90_000_000, 0.9)]
    for index, net in enumerate("abc"):
        rows += [
            row(net, 1_000_000 * (30 - i) + 50_000 * index, 0.9 - spread * i, f"d{30 - i}")
            for i in range(depths)
        ]
    return Report((*rows, row("ensemble", 60_000_000, 0.9)))


def profile(depths: int, spread: float) -> Profile:
    rows = [
        profile_row(f"d{depth}", batch, batch * (1 + depth / 20), 0.8 + spread * depth)
        for batch in (1, 8)
        for depth in range(depths)
    ]
    return Profile("cpu", "a machine", 1, rows, "test")


def boxes(figure: Figure) -> list[list]:
    """The boxes of the names in each of the axes, after the picture has been drawn."""
    figure.canvas.draw()
    return [[text.get_window_extent() for text in axes.texts] for axes in figure.axes]


@pytest.mark.parametrize("spread", [0.0, 0.02])
@pytest.mark.parametrize("depths", [4, 30])
@pytest.mark.parametrize(
    "draw", [lambda *args: report(*args).figure(), lambda *args: draw_profile(profile(*args))]
)
def test_names_neither_overlap_nor_leave_the_frame(draw, depths, spread):
    figure = draw(depths, spread)
    figure.set_dpi(150)  # that of the files, unlike that at which the places are found
    for axes, names in zip(figure.axes, boxes(figure), strict=True):
        assert len(names) >= (4 if depths == 4 else 10)
        frame = axes.get_window_extent()
        for box in names:
            assert frame.contains(box.x0, box.y0)
            assert frame.contains(box.x1, box.y1)
        assert not any(one.overlaps(other) for one, other in combinations(names, 2))
        (legend,) = figure.legends
        assert not legend.get_window_extent().overlaps(frame)


def test_each_of_a_few_depths_has_its_name(pytestconfig):
    path = pytestconfig.rootpath / "benchmarks/results/digits.json"
    figure = Report.load(path).figure()
    names = sorted(text.get_text() for text in figure.axes[0].texts)
    assert names == ["d0", "d1", "d2", "d4", "d5", "d6", "d7", "d7"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["Leader", "Teammate A", "Teammate B", "Ensemble"]
    styles = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(styles) == 4


def test_numbers_of_macs_have_a_unit():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 2e6, 4e9], [0, 1, 2])
    label_macs(axes)
    formatter = axes.xaxis.get_major_formatter()
    assert [formatter(macs) for macs in (0, 2.5e6, 4e9)] == ["0", "2.5 M", "4 G"]
    assert "(MACs)" in axes.get_xlabel()


def test_axes_of_a_profile_have_units():
    for axes in draw_profile(profile(4, 0.01)).axes:
        assert axes.get_xlabel().endswith(", ms")

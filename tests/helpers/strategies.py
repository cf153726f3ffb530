"""Hypothesis strategies."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import assume
from hypothesis import strategies as st

from teamnet_pl.elastic import DepthSpec


@st.composite
def depth_specs(draw: st.DrawFn, sizes: Sequence[int]) -> DepthSpec:
    """Depths of a net with stages of the given sizes, in each form that a user can choose."""
    total = sum(sizes)
    form = draw(st.sampled_from(["number", "counts", "rows"]))
    if form == "number":
        return draw(st.integers(2, total + 1))
    if form == "counts":
        return [total, *draw(st.sets(st.integers(0, total - 1), min_size=1))]
    rows = [list(sizes)]
    for _ in range(draw(st.integers(1, 4))):
        row = [draw(st.integers(0, kept)) for kept in rows[-1]]
        if row != rows[-1]:
            rows.append(row)
    assume(len(rows) > 1)
    return rows

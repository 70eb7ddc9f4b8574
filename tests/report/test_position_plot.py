from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalibi.evaluate.by_position import bin_positions
from megalibi.report.plots import save_figure
from megalibi.report.position_plot import position_curve


def sums_of(length: int) -> NDArray[np.float64]:
    """Two tokens of loss p at each position p."""
    return np.stack([2.0 * np.arange(length), np.full(length, 2.0)])


def test_the_figure_has_a_line_for_each_length(tmp_path: Path) -> None:
    figure = position_curve({4: sums_of(4), 64: sums_of(64)}, train_seq_length=4)
    (axes,) = figure.axes
    *curves, marker = axes.get_lines()
    assert [curve.get_label() for curve in curves] == ["4 tokens at once", "64 tokens at once"]
    assert list(marker.get_xdata()) == [4, 4]
    for curve, length in zip(curves, (4, 64), strict=True):
        bins = bin_positions(sums_of(length), per_doubling=2)
        assert list(curve.get_ydata()) == [b.loss for b in bins]
    save_figure(figure, tmp_path / "positions.png")
    assert (tmp_path / "positions.png").stat().st_size > 1000

"""The figure of the loss by position in the window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from megalibi.evaluate.by_position import bin_positions
from megalibi.report.plots import MUTED, SERIES_COLORS, new_figure, place_legend

_DRAWN_PER_DOUBLING = 2


def position_curve(sums_by_length: Mapping[int, NDArray[np.float64]], *, train_seq_length: int) -> Figure:
    """Draw the mean loss against the tokens seen, one line for each length, with the training length marked.

    Args:
        sums_by_length: Summed loss and number of scored tokens by position, [2, S], for each evaluation length.
        train_seq_length: Length of the training samples, in tokens.
    """
    figure, (axes,) = new_figure(height_inches=3.3)
    for number, (length, sums_2S) in enumerate(sums_by_length.items()):
        bins = bin_positions(sums_2S, per_doubling=_DRAWN_PER_DOUBLING)
        axes.plot(
            [b.middle for b in bins],
            [b.loss for b in bins],
            color=SERIES_COLORS[number % len(SERIES_COLORS)],
            linewidth=1.6,
            label=f"{length:,} tokens at once",
        )
    label_positions(axes, train_seq_length, "tokens seen")
    place_legend(axes, loc="upper right")
    return figure


def label_positions(axes: Axes, train_seq_length: int, seen: str) -> None:
    """Give the axes of losses by position their scales and names, and mark the training length.

    Args:
        axes: The panel.
        train_seq_length: Length of the training samples, in tokens.
        seen: What the horizontal axis counts, in words.
    """
    scale_tokens(axes, train_seq_length)
    axes.set_xlabel(f"{seen} (dashed: the training length, {train_seq_length:,})")
    axes.set_ylabel("loss (nats per token)")


def scale_tokens(axes: Axes, train_seq_length: int) -> None:
    """Make a horizontal axis of numbers of tokens logarithmic, and draw a dashed line at the training length.

    Args:
        axes: The panel.
        train_seq_length: Length of the training samples, in tokens.
    """
    axes.axvline(train_seq_length, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

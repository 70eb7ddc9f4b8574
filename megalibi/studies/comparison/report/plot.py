"""The analogue of the paper's Figure 5: perplexity against hours of training, for each pair and each clock."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from megalibi.report.plots import INK, PAPER, SERIES_COLORS, new_figure
from megalibi.studies.comparison.curves import Point
from megalibi.studies.comparison.results import Pair, Results
from megalibi.studies.comparison.study import ATTENTIONS

_ROW_INCHES = 2.7
_HIGHEST_OVER_END = 4.0
"""Perplexities above this many times the lowest are cut off: the first checkpoints would flatten all others."""


def training_curves(results: Results) -> Figure:
    """Draw perplexity against hours: a column for each pair, a row for each kind of attention, which has its own clock.

    Args:
        results: Results that have the curves of all pairs.
    """
    pairs = results.study.pairs()
    figure, panels = new_figure(height_inches=_ROW_INCHES * len(ATTENTIONS), columns=len(pairs), rows=len(ATTENTIONS))
    cells = [(pair, attention) for attention in ATTENTIONS for pair in pairs]
    for axes, (pair, attention) in zip(panels, cells, strict=True):
        _draw_pair(axes, results, pair, attention)
    return figure


def _draw_pair(axes: Axes, results: Results, pair: Pair, attention: str) -> None:
    curves = dict(zip(pair, results.pair_points(pair, attention), strict=True))
    for number, (model, points) in enumerate(curves.items()):
        axes.plot(
            [point.hours for point in points],
            [point.perplexity for point in points],
            color=SERIES_COLORS[number],
            marker="os"[number],
            markersize=4,
            markeredgecolor=PAPER,
            linewidth=1.6,
            label=str(model),
        )
    axes.set_title(f"evaluated at {pair[1].length:,}, {attention} attention", fontsize=9, color=INK)
    axes.set_xlabel("hours of training, by the turns' clock")
    axes.set_ylabel("perplexity")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _scale(axes, [point for points in curves.values() for point in points])
    axes.legend(loc="upper right", frameon=False, fontsize=8, labelcolor=INK)


def _scale(axes: Axes, points: list[Point]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if points:
        lowest = min(point.perplexity for point in points)
        axes.set_ylim(lowest * 0.97, min(max(p.perplexity for p in points) * 1.03, lowest * _HIGHEST_OVER_END))

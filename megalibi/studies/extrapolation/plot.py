"""The paper's Figure 4: perplexity against evaluation length, a line for each method, both protocols side by side.

A second picture has the loss by tokens seen. A line is the mean over the seeds, and the band around it goes from the
lowest seed to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from megalibi.report.plots import INK, MUTED, PAPER, SERIES_COLORS, new_figure
from megalibi.report.position_plot import label_positions, scale_tokens
from megalibi.studies.extrapolation.positions import PositionCurves
from megalibi.studies.extrapolation.spread import Spread, spread_curves
from megalibi.studies.extrapolation.study import (
    INTERPOLATED,
    METHOD_NAMES,
    NONOVERLAPPING,
    PROTOCOLS,
    SeedCurves,
    trained_method,
)

CLIP_RATIO = 1.5
"""The axis ends at this many times the worst perplexity at the training length: otherwise one curve that explodes would
flatten all others."""
_MARGIN = 0.06
_MARKERS = ("o", "s", "D", "^", "v", "P")
_SMALL_POINTS = 7.5
_LEGEND_POINTS = 8.5
_BAND_ALPHA = 0.2
_ROW = 0.062  # height of a row of written values, as a fraction of a panel's


def extrapolation_figure(curves: SeedCurves, *, train_length: int, stride: int) -> Figure:
    """Draw perplexity against evaluation length; values past the end of the axis are written above it.

    Args:
        curves: Perplexities by seed, protocol and position method.
        train_length: Tokens that the models were trained at; a line marks it.
        stride: Tokens between the starts of two windows of sliding evaluation.
    """
    figure, panels = new_figure(height_inches=4.1, columns=len(PROTOCOLS))
    spreads = spread_curves(curves)
    drawn = [curve for lines in spreads.values() for curve in lines.values()]
    low = min(spread.low for curve in drawn for spread in curve.values())
    highest = max(spread.high for curve in drawn for spread in curve.values())
    top = min(CLIP_RATIO * max(curve[train_length].mean for curve in drawn), highest + _MARGIN * (highest - low))
    for axes, protocol in zip(panels, PROTOCOLS, strict=True):
        _draw_panel(axes, spreads[protocol], train_length, top)
        axes.set_ylim(low - _MARGIN * (top - low), top)
        title = "nonoverlapping" if protocol == NONOVERLAPPING else f"sliding, stride {stride}"
        axes.set_xlabel(f"evaluation length (tokens), {title}")
    panels[0].set_ylabel("perplexity")
    _add_legend(figure, panels)
    return figure


def loss_by_position_figure(curves: PositionCurves, *, train_length: int) -> Figure:
    """Draw the loss against the tokens seen, in windows of the longest length; a curve that ends before is left out.

    Such a curve is that of learned positions, which have none beyond the training length.

    Args:
        curves: Losses by curve and window length, from spread_positions.
        train_length: Tokens that the models were trained at; a line marks it.
    """
    figure, (axes,) = new_figure(height_inches=3.5)
    longest = max(length for by_length in curves.values() for length in by_length)
    for curve in (name for name in METHOD_NAMES if longest in curves.get(name, {})):
        ranges = curves[curve][longest]
        _draw_spreads(axes, curve, [r.middle for r in ranges], [r.loss for r in ranges])
    label_positions(axes, train_length, f"tokens seen, in windows of {longest:,}")
    _add_legend(figure, [axes])
    return figure


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Add one row of names below the panels; it is close enough for all curves that there can be."""
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(METHOD_NAMES),
        frameon=False,
        labelcolor=INK,
        fontsize=_LEGEND_POINTS,
        handlelength=1.8,
        columnspacing=1.2,
    )


def _style(curve: str) -> dict[str, Any]:
    """Return how a curve is drawn: in its method's colour, and dashed if it is a second one of the same models."""
    number = [name for name in METHOD_NAMES if name != INTERPOLATED].index(trained_method(curve))
    style = {"color": SERIES_COLORS[number], "marker": _MARKERS[number], "label": METHOD_NAMES[curve]}
    return style | {"linestyle": (0, (3, 1.5)) if curve == INTERPOLATED else "solid"}


def _draw_spreads(axes: Axes, curve: str, x: Sequence[float], spreads: Sequence[Spread]) -> None:
    style = _style(curve)
    means = [spread.mean for spread in spreads]
    axes.plot(x, means, markersize=5, markeredgecolor=PAPER, linewidth=1.8, **style)
    lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(x, lows, highs, color=style["color"], alpha=_BAND_ALPHA, linewidth=0)


def _draw_panel(axes: Axes, curves: Mapping[str, Mapping[int, Spread]], train_length: int, top: float) -> None:
    written = 0
    for method in (name for name in METHOD_NAMES if name in curves):
        _draw_spreads(axes, method, list(curves[method]), list(curves[method].values()))
        above = {length: spread.mean for length, spread in curves[method].items() if spread.mean > top}
        for length, value in above.items():
            axes.annotate(
                f"{value:,.0f}" if value < 1e5 else f"{value:.0e}",
                xy=(length, 1.02 + _ROW * written),
                xycoords=("data", "axes fraction"),
                ha="center",
                color=_style(method)["color"],
                fontsize=_SMALL_POINTS,
            )
        written += bool(above)
    if written:
        axes.annotate("beyond", xy=(0.0, 1.02), xycoords="axes fraction", color=MUTED, fontsize=_SMALL_POINTS)
    scale_tokens(axes, train_length)
    axes.xaxis.set_major_locator(FixedLocator(sorted({length for curve in curves.values() for length in curve})))
    axes.xaxis.set_minor_locator(NullLocator())

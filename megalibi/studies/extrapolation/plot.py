"""The paper's Figure 4: perplexity against evaluation length, a line for each method, both protocols side by side.

A line is the mean over the seeds, and the band around it goes from the lowest seed to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megalibi.report.plots import INK, MUTED, PAPER, SERIES_COLORS, new_figure
from megalibi.studies.extrapolation.spread import Spread, spread_curves
from megalibi.studies.extrapolation.study import METHOD_NAMES, NONOVERLAPPING, PROTOCOLS, SeedCurves

CLIP_RATIO = 1.5
"""The axis ends at this many times the worst perplexity at the training length: otherwise one curve that explodes would
flatten all others."""
_MARGIN = 0.06
_MARKERS = ("o", "s", "D", "^", "v", "P")
_SMALL_POINTS = 7.5
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
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, labelcolor=INK
    )
    return figure


def _draw_panel(axes: Axes, curves: Mapping[str, Mapping[int, Spread]], train_length: int, top: float) -> None:
    written = 0
    for number, (method, name) in enumerate(METHOD_NAMES.items()):
        if method not in curves:
            continue
        color, curve = SERIES_COLORS[number], curves[method]
        style = {"marker": _MARKERS[number], "markersize": 5, "markeredgecolor": PAPER, "linewidth": 1.8}
        lengths, means = list(curve), [spread.mean for spread in curve.values()]
        axes.plot(lengths, means, color=color, label=name, **style)  # type: ignore[arg-type]
        lows, highs = [spread.low for spread in curve.values()], [spread.high for spread in curve.values()]
        axes.fill_between(lengths, lows, highs, color=color, alpha=_BAND_ALPHA, linewidth=0)
        above = {length: mean for length, mean in zip(lengths, means, strict=True) if mean > top}
        for length, value in above.items():
            axes.annotate(
                f"{value:,.0f}" if value < 1e5 else f"{value:.0e}",
                xy=(length, 1.02 + _ROW * written),
                xycoords=("data", "axes fraction"),
                ha="center",
                color=color,
                fontsize=_SMALL_POINTS,
            )
        written += bool(above)
    if written:
        axes.annotate("beyond", xy=(0.0, 1.02), xycoords="axes fraction", color=MUTED, fontsize=_SMALL_POINTS)
    axes.axvline(train_length, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({length for curve in curves.values() for length in curve})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

"""The figures of a report: loss, extrapolation, speed and memory.

Figures are made without pyplot, which keeps global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from megalibi.evaluate.result import Evaluation
from megalibi.files import open_aside
from megalibi.metrics.records import RunMetrics
from megalibi.units import format_count

Floats = NDArray[np.float64]

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), whose colours can be told apart with every common
# kind of colour vision. Yellow is left out, because it cannot be read on white.
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID, PAPER = "#1f2430", "#667085", "#e4e7ec", "#ffffff"

# In a page these colours become CSS variables with the printed colour as their default, so that the page's dark theme
# changes the figures too.
_CSS_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES_COLORS)
}
_MARKERS = ("o", "s", "D", "^", "v", "P")
_FONT_POINTS = 9.0
_WIDTH_INCHES = 7.2
_MAX_POINTS = 1200  # more cannot be told apart at page width, and would make the page heavy
_SMOOTHED_FRACTION = 0.02
_LOG_SCALE_RATIO = 4.0


def loss_curve(runs: Mapping[str, RunMetrics], *, against: Literal["steps", "tokens"] = "tokens") -> Figure:
    """Draw the training loss, as measured and smoothed, and the validation loss of one or several runs.

    The vertical axis begins at the highest loss after the first twentieth of the run, because the losses before would
    flatten the rest.

    Args:
        runs: The metrics of each run by the name to show.
        against: What the horizontal axis counts.
    """
    figure, (axes,) = new_figure(height_inches=3.5)
    several = len(runs) > 1
    top = 0.0
    for number, (name, metrics) in enumerate(runs.items()):
        color = SERIES_COLORS[number % len(SERIES_COLORS)]
        x = np.array([getattr(record, _field(against)) for record in metrics.steps], dtype=np.float64)
        loss = np.array([record.loss for record in metrics.steps], dtype=np.float64)
        shown = [*loss[len(loss) // 20 :], *(record.validation_loss for record in metrics.validations)]
        top = max([top, *filter(np.isfinite, shown)])
        _draw_noisy(axes, x, loss, color=color, label=name if several else "training")
        if metrics.validations:
            axes.plot(
                [getattr(record, _field(against)) for record in metrics.validations],
                [record.validation_loss for record in metrics.validations],
                color=color if several else SERIES_COLORS[1],
                linestyle=(0, (2, 2)),
                linewidth=1.0,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4.5,
                markeredgecolor=PAPER,
                label=None if several else "validation",
            )
    if top > 0:
        axes.set_ylim(top=top + 0.04 * (top - axes.get_ylim()[0]))
    axes.set_xlabel("training tokens" if against == "tokens" else "optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(_tick_label)
    place_legend(axes, loc="upper right")
    return figure


def extrapolation_curve(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Draw perplexity against evaluation length, with the training length marked.

    Args:
        evaluations: The evaluations by the name to show.
    """
    figure, (axes,) = new_figure(height_inches=3.3)
    lengths = sorted({result.length for evaluation in evaluations.values() for result in evaluation.results})
    for number, (name, evaluation) in enumerate(evaluations.items()):
        axes.plot(
            [result.length for result in evaluation.results],
            [result.perplexity for result in evaluation.results],
            color=SERIES_COLORS[number % len(SERIES_COLORS)],
            linewidth=1.8,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=6,
            markeredgecolor=PAPER,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _scale_perplexity(axes, [r.perplexity for evaluation in evaluations.values() for r in evaluation.results])
    for train_seq_length in sorted({evaluation.train_seq_length for evaluation in evaluations.values()}):
        axes.axvline(train_seq_length, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"training length {train_seq_length:,}",
            xy=(train_seq_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3),
            textcoords="offset points",
            color=MUTED,
            fontsize=_FONT_POINTS - 1,
        )
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel("perplexity")
    if len(evaluations) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT_POINTS, labelcolor=INK)
    return figure


def speed_and_memory(runs: Mapping[str, RunMetrics]) -> Figure:
    """Draw tokens per second and memory by step, side by side.

    Args:
        runs: The metrics of each run by the name to show.
    """
    figure, (speed, memory) = new_figure(height_inches=2.6, columns=2)
    several = len(runs) > 1
    for number, (name, metrics) in enumerate(runs.items()):
        color = SERIES_COLORS[number % len(SERIES_COLORS)]
        steps = np.array([record.step for record in metrics.steps], dtype=np.float64)
        tokens_per_second = np.array([record.tokens_per_second for record in metrics.steps], dtype=np.float64)
        in_use = np.array([record.memory_bytes for record in metrics.steps], dtype=np.float64) / 1e9
        peak = np.array([record.memory_peak_bytes for record in metrics.steps], dtype=np.float64) / 1e9
        _draw_noisy(speed, steps, tokens_per_second, color=color, label=name if several else None)
        memory.plot(*_thin(steps, in_use), color=color, linewidth=1.6, label=None if several else "in use")
        memory.plot(
            *_thin(steps, peak),
            color=color,
            linewidth=1.1,
            linestyle=(0, (2, 2)),
            label=None if several else "highest so far",
        )
    speed.set_ylabel("tokens per second")
    memory.set_ylabel("memory of rank 0 (GB)")
    for axes in (speed, memory):
        axes.set_ylim(bottom=0, top=1.12 * axes.dataLim.ymax)
        axes.set_xlabel("optimizer steps")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(_tick_label)
        place_legend(axes, loc="lower right")
    return figure


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure to a file on white paper, at a size for a README.

    Args:
        figure: The figure.
        path: The file to write; the ending of its name gives the format.
    """
    with open_aside(path) as file:
        figure.savefig(file, format=Path(path).suffix.removeprefix(".") or None, dpi=200, facecolor=PAPER)


def inline_svg(figure: Figure, *, key: str, title: str) -> str:
    """Return a figure as an SVG element for a page.

    Text stays text. Colours follow the CSS variables ``--ink``, ``--muted``, ``--grid``, ``--paper`` and
    ``--series-0`` ... of the page.

    Args:
        figure: The figure.
        key: A prefix of every id of the element; it must differ between the figures of a page.
        title: The text that a screen reader says.
    """
    buffer = io.StringIO()
    # The salt makes the ids, and with them the page, the same whenever the command runs.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{key}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", svg, count=1)
    for color, name in _CSS_NAMES.items():
        svg = svg.replace(f": {color}", f": var(--{name}, {color})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _field(against: Literal["steps", "tokens"]) -> str:
    return "step" if against == "steps" else "tokens"


def new_figure(*, height_inches: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Return an empty figure of the report's width and look, and its panels from left to right, row by row.

    Args:
        height_inches: Height of the figure.
        columns: Number of panels side by side.
        rows: Number of rows of panels.
    """
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=_FONT_POINTS, colors=INK, length=3, color=MUTED)
        axes.xaxis.label.set(fontsize=_FONT_POINTS, color=INK)
        axes.yaxis.label.set(fontsize=_FONT_POINTS, color=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(MUTED)
    return figure, panels


def _tick_label(value: float, _position: float) -> str:
    return format_count(value).replace(".0", "") if abs(value) >= 1000 else f"{value:g}"


def place_legend(axes: Axes, *, loc: Literal["upper right", "lower right"]) -> None:
    """Add a legend if any line has a label.

    Args:
        axes: The panel.
        loc: The corner of the legend.
    """
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=loc, frameon=False, fontsize=_FONT_POINTS, labelcolor=INK)


def _draw_noisy(axes: Axes, x: Floats, y: Floats, *, color: str, label: str | None) -> None:
    """Draw a measurement in a light line and its moving mean over it."""
    axes.plot(*_thin(x, y), color=color, linewidth=0.8, alpha=0.3)
    axes.plot(*_thin(x, _smooth(y)), color=color, linewidth=1.8, label=label)


def _smooth(values: Floats) -> Floats:
    """Return the centred moving mean over a fiftieth of the values; values that are not finite are left out."""
    width = max(1, round(len(values) * _SMOOTHED_FRACTION)) | 1
    finite = np.isfinite(values)
    window = np.ones(width)
    middle = slice(width // 2, width // 2 + len(values))
    sums = np.convolve(np.where(finite, values, 0.0), window)[middle]
    counts = np.convolve(finite.astype(np.float64), window)[middle]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Thin a curve to what a page can show: the lowest and the highest point of each stretch, so that spikes stay."""
    if len(x) <= _MAX_POINTS:
        return x, y
    finite = np.isfinite(y)
    low, high = np.where(finite, y, np.inf), np.where(finite, y, -np.inf)
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), _MAX_POINTS // 2):
        first = int(stretch[0])
        kept.extend(sorted({first + int(low[stretch].argmin()), first + int(high[stretch].argmax())}))
    return x[kept], y[kept]


def _scale_perplexity(axes: Axes, perplexities: Sequence[float]) -> None:
    """Make the axis logarithmic if a model that does not extrapolate would flatten the curves of the others."""
    finite = [value for value in perplexities if np.isfinite(value)]
    if not finite or max(finite) < _LOG_SCALE_RATIO * min(finite):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(_tick_label)
    axes.yaxis.set_minor_formatter(NullFormatter())

"""Loss against the position in the window: bins, a table and a figure.

It tells apart the two reasons for which a longer window can score better: fewer of its tokens have little context, or
tokens with much context are predicted better (arXiv:2108.12409, appendix B.2, "early token curse").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from megalibi.report.plots import MUTED, SERIES_COLORS, new_figure, place_legend

VALUES_MAX = 4096
"""Mean losses that are kept of a window."""
_DRAWN_PER_DOUBLING = 2


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """The mean loss of the predictions that have seen from ``first`` to ``last`` tokens of their window."""

    first: int
    """Fewest tokens seen, the one before the predicted token included; from 1 on."""
    last: int
    """Most tokens seen."""
    loss: float
    """Mean cross entropy in nats per token."""
    tokens: int
    """Predictions that are scored."""


def bin_positions(sums_2S: NDArray[np.float64], *, per_doubling: int = 1) -> list[PositionBin]:
    """Return bins that grow with the tokens seen: 1, 2, 3 to 4, 5 to 8 and so on. Those without tokens are left out.

    Args:
        sums_2S: Summed loss and scored tokens by position in the window.
        per_doubling: Bins for each doubling of the tokens seen.
    """
    length = sums_2S.shape[1]
    steps = range(math.ceil(per_doubling * math.log2(length)) + 1)
    ends = sorted({min(length, math.ceil(2 ** (step / per_doubling) - 1e-9)) for step in steps})
    return _cut(sums_2S, ends)


def _cut(sums_2S: NDArray[np.float64], ends: Sequence[int]) -> list[PositionBin]:
    bins = []
    for first, last in zip([0, *ends], ends, strict=False):
        loss_sum, tokens = sums_2S[:, first:last].sum(1).tolist()
        if tokens:
            bins.append(PositionBin(first=first + 1, last=last, loss=loss_sum / tokens, tokens=int(tokens)))
    return bins


def to_columns(sums_2S: NDArray[np.float64]) -> dict[str, list[int] | list[float]]:
    """Return the columns for a JSON file: tokens seen, mean loss and scored tokens, for every position with any.

    Of a window longer than 4,096, neighbouring positions share a value, at the most tokens that they have seen.
    """
    length = sums_2S.shape[1]
    width = math.ceil(length / VALUES_MAX)
    bins = _cut(sums_2S, [*range(width, length, width), length])
    return {
        "seen": [b.last for b in bins],
        "loss": [round(b.loss, 6) for b in bins],
        "tokens": [b.tokens for b in bins],
    }


def format_table(by_length: Mapping[int, Sequence[PositionBin]]) -> str:
    """Return a plain table of mean losses: a row for the tokens seen, a column for each length."""
    longest = max(by_length)
    ranges = sorted({(2 ** (power - 1) + 1 if power else 1, 2**power) for power in range(longest.bit_length() + 1)})
    lines = [f"{'tokens seen':<18}" + "".join(f"{length:>12,}" for length in by_length)]
    for first, last in ranges:
        row = {length: b.loss for length, bins in by_length.items() for b in bins if b.first == first}
        if row:
            seen = f"{first:,}" if first == last else f"{first:,} to {min(last, longest):,}"
            cells = (f"{row[length]:>12.4f}" if length in row else f"{'-':>12}" for length in by_length)
            lines.append(f"{seen:<18}" + "".join(cells))
    return "\n".join(lines)


def position_curve(sums_by_length: Mapping[int, NDArray[np.float64]], *, train_seq_length: int) -> Figure:
    """Draw mean loss against the tokens seen, one line for each length, with the training length marked.

    Args:
        sums_by_length: Summed loss and scored tokens by position, for each evaluation length.
        train_seq_length: Tokens the model saw at once in training.
    """
    figure, (axes,) = new_figure(height_inches=3.3)
    for number, (length, sums_2S) in enumerate(sums_by_length.items()):
        bins = bin_positions(sums_2S, per_doubling=_DRAWN_PER_DOUBLING)
        axes.plot(
            [math.sqrt(b.first * b.last) for b in bins],
            [b.loss for b in bins],
            color=SERIES_COLORS[number % len(SERIES_COLORS)],
            linewidth=1.6,
            label=f"{length:,} tokens at once",
        )
    axes.axvline(train_seq_length, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(f"tokens seen (dashed: the training length, {train_seq_length:,})")
    axes.set_ylabel("loss (nats per token)")
    place_legend(axes, loc="upper right")
    return figure

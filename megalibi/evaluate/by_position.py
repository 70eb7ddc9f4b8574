"""Loss against the position in the window: bins and a table.

A longer window can have a lower loss for two reasons: fewer of its tokens have little context, or tokens with much
context are predicted better. The loss by position tells them apart (arXiv:2108.12409, appendix B.2, "early token
curse").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VALUES_MAX = 4096
"""Largest number of mean losses that are kept for one window length."""


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """The mean loss of the predictions that have seen from ``first`` to ``last`` tokens of their window."""

    first: int
    """Fewest tokens seen before a prediction of the bin; at least 1."""
    last: int
    """Most tokens seen before a prediction of the bin."""
    loss: float
    """Mean cross entropy of the predictions, in nats per token."""
    tokens: int
    """Number of predictions that were scored."""


def bin_positions(sums_2S: NDArray[np.float64], *, per_doubling: int = 1) -> list[PositionBin]:
    """Return bins that grow with the tokens seen: 1, 2, 3 to 4, 5 to 8 and so on. Empty bins are left out.

    Args:
        sums_2S: Summed loss and number of scored tokens by position in the window, [2, S].
        per_doubling: Number of bins for each doubling of the tokens seen.
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


def to_columns(sums_2S: NDArray[np.float64]) -> dict[str, list[float]]:
    """Return columns for a JSON file: tokens seen, mean loss and number of scored tokens.

    Every position that was scored has a value. In windows of more than 4,096 tokens neighbouring positions share one,
    which stands at the most tokens seen among them.

    Args:
        sums_2S: Summed loss and number of scored tokens by position in the window, [2, S].
    """
    length = sums_2S.shape[1]
    width = math.ceil(length / VALUES_MAX)
    bins = _cut(sums_2S, [*range(width, length, width), length])
    return {
        "seen": [b.last for b in bins],
        "loss": [round(b.loss, 6) for b in bins],
        "tokens": [b.tokens for b in bins],
    }


def format_positions(by_length: Mapping[int, Sequence[PositionBin]]) -> str:
    """Return a plain table of mean losses: a row for each range of tokens seen, a column for each length.

    Args:
        by_length: The bins of each evaluation length.
    """
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

"""Loss against the position in the window: bins and a table.

A longer window can have a lower loss for two reasons: fewer of its tokens have little context, or tokens with much
context are predicted better. The loss by position tells them apart (arXiv:2108.12409, appendix B.2, "early token
curse").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

VALUES_MAX = 4096
"""Largest number of mean losses that are kept for one window length."""


@dataclass(frozen=True, kw_only=True)
class PositionRange:
    """Some predictions, by the tokens of their window that they have seen."""

    first: int
    """Fewest tokens seen before a prediction of the range; at least 1."""
    last: int
    """Most tokens seen before a prediction of the range."""

    @property
    def words(self) -> str:
        """The range in words, as a row of a table begins."""
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} to {self.last:,}"

    @property
    def middle(self) -> float:
        """Where the range stands on a logarithmic axis."""
        return math.sqrt(self.first * self.last)


@dataclass(frozen=True, kw_only=True)
class PositionBin(PositionRange):
    """The mean loss of the predictions of a range."""

    loss: float
    """Mean cross entropy of the predictions, in nats per token."""
    tokens: int
    """Number of predictions that were scored."""


_Key = TypeVar("_Key")
_Range = TypeVar("_Range", bound=PositionRange)


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


def align_ranges(columns: Mapping[_Key, Sequence[_Range]]) -> Iterator[tuple[_Range, dict[_Key, _Range]]]:
    """Yield the rows of a table by rising tokens seen: the longest range of a row, and all of them by column.

    Args:
        columns: The ranges of each column; those of a row begin at the same number of tokens seen, and end there too
            but for those at the end of a shorter window.
    """
    rows: dict[int, dict[_Key, _Range]] = {}
    for key, ranges in columns.items():
        for found in ranges:
            rows.setdefault(found.first, {})[key] = found
    for _, row in sorted(rows.items()):
        yield max(row.values(), key=lambda found: found.last), row


def format_positions(by_length: Mapping[int, Sequence[PositionBin]]) -> str:
    """Return a plain table of mean losses: a row for each range of tokens seen, a column for each length.

    Args:
        by_length: The bins of each evaluation length.
    """
    lines = [f"{'tokens seen':<18}" + "".join(f"{length:>12,}" for length in by_length)]
    for longest, row in align_ranges(by_length):
        cells = (f"{row[length].loss:>12.4f}" if length in row else f"{'-':>12}" for length in by_length)
        lines.append(f"{longest.words:<18}" + "".join(cells))
    return "\n".join(lines)

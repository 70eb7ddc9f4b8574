"""The loss by tokens seen in windows longer than those of the training: ranges of positions, and where the loss rises.

A longer window can have a higher loss at every position or past some number of tokens seen; the loss of whole windows
does not tell which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megalibi.evaluate.by_position import PositionBin
from megalibi.report.markdown import format_table
from megalibi.studies.extrapolation.spread import Spread
from megalibi.studies.extrapolation.study import METHOD_NAMES
from megalibi.studies.finding import FLAT

PositionColumns = Mapping[int, Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]]
"""Seed -> curve, by a key of METHOD_NAMES -> evaluation length -> losses as by_position.to_columns gives them."""


@dataclass(frozen=True, kw_only=True)
class PositionSpread:
    """The loss of the predictions that have seen from ``first`` to ``last`` tokens of their window."""

    first: int
    """Fewest tokens seen before a prediction of the range; at least 1."""
    last: int
    """Most tokens seen before a prediction of the range."""
    tokens: int
    """Number of predictions that were scored, of one seed."""
    loss: Spread
    """Mean cross entropy of the predictions over the seeds, in nats per token."""


PositionCurves = Mapping[str, Mapping[int, Sequence[PositionSpread]]]
"""Curve, by a key of METHOD_NAMES -> the training length and the curve's longest -> losses by rising tokens seen."""


def spread_positions(columns: PositionColumns, train_length: int) -> PositionCurves:
    """Return the losses of all seeds as one, in ranges that double and end at the training length among others.

    Args:
        columns: The losses by position of windows that do not overlap; every seed has the same curves and lengths.
        train_length: Tokens that the models were trained at; every curve has it.
    """
    first = next(iter(columns.values()))
    return {
        curve: {
            length: _spread_ranges([of_seed[curve][length] for of_seed in columns.values()], train_length)
            for length in sorted({train_length, max(by_length)})
        }
        for curve, by_length in first.items()
    }


def _spread_ranges(of_seeds: Sequence[Mapping[str, Sequence[float]]], train_length: int) -> list[PositionSpread]:
    return [
        PositionSpread(
            first=ranges[0].first,
            last=ranges[0].last,
            tokens=ranges[0].tokens,
            loss=Spread.of_values([r.loss for r in ranges]),
        )
        for ranges in zip(*(_cut_columns(columns, train_length) for columns in of_seeds), strict=True)
    ]


def _cut_columns(columns: Mapping[str, Sequence[float]], train_length: int) -> list[PositionBin]:
    """Return ranges of positions; where neighbours share a value, a range ends with the last of them."""
    seen, tokens = (np.array(columns[name], dtype=np.int64) for name in ("seen", "tokens"))
    sums = np.array(columns["loss"], dtype=np.float64) * tokens
    doublings = range(-train_length.bit_length(), math.ceil(math.log2(seen[-1] / train_length)) + 1)
    cuts = np.unique(np.searchsorted(seen, [math.ceil(train_length * 2.0**power) for power in doublings], side="right"))
    return [
        PositionBin(
            first=int(seen[start - 1]) + 1 if start else 1,
            last=int(seen[end - 1]),
            loss=float(sums[start:end].sum() / tokens[start:end].sum()),
            tokens=int(tokens[start:end].sum()),
        )
        for start, end in zip([0, *cuts], cuts, strict=False)
        if start < end
    ]


def find_lasting_rise(by_length: Mapping[int, Sequence[PositionSpread]], train_length: int) -> PositionSpread | None:
    """Return the first range beyond the training length from which the loss is too high to the end of the window.

    Too high is more than FLAT above the loss at the end of windows of the training length. One range may be so by its
    text, which is another than that of its neighbours; all up to the end are not.

    Args:
        by_length: One curve of spread_positions.
        train_length: Tokens that the models were trained at.
    """
    rise = None
    for spread in reversed(by_length[max(by_length)]):
        if spread.last <= train_length or _rise_of(spread, by_length, train_length) <= FLAT:
            break
        rise = spread
    return rise


def _rise_of(spread: PositionSpread, by_length: Mapping[int, Sequence[PositionSpread]], train_length: int) -> float:
    return spread.loss.mean / by_length[train_length][-1].loss.mean - 1.0


def format_position_curves(curves: PositionCurves, train_length: int) -> Iterator[str]:
    """Yield the lines of the Markdown table, a row for each range of tokens seen, and what it shows in words.

    Args:
        curves: From spread_positions.
        train_length: Tokens that the models were trained at.
    """
    shown = [curve for curve in METHOD_NAMES if curve in curves]
    longest = max(length for by_length in curves.values() for length in by_length)
    rows = []
    if longest > train_length:
        ends = {curve: curves[curve][train_length][-1] for curve in shown}
        name = f"{_name_range(ends[shown[0]])}, in windows of {train_length:,}"
        rows.append([name, f"{ends[shown[0]].tokens:,}", *(_loss_cell(ends[curve]) for curve in shown)])
    by_range: dict[tuple[int, int], dict[str, PositionSpread]] = {}
    for curve in shown:
        for spread in curves[curve].get(longest, ()):
            by_range.setdefault((spread.first, spread.last), {})[curve] = spread
    for found in by_range.values():
        some = next(iter(found.values()))
        rows.append([_name_range(some), f"{some.tokens:,}", *(_loss_cell(found.get(curve)) for curve in shown)])
    yield from format_table(["tokens seen", "predictions", *(METHOD_NAMES[curve] for curve in shown)], rows)
    yield ""
    yield (
        "Loss in nats per token, without overlap, by the tokens of its window that a prediction has seen, in windows "
        f"of {longest:,} tokens{' but for the first row' * (longest > train_length)}. Ranges are of different text, "
        "the same for all methods: few predictions say little."
    )
    if longer := [curve for curve in shown if max(curves[curve]) > train_length]:
        yield ""
        yield _describe_rises({curve: curves[curve] for curve in longer}, train_length)


def _name_range(spread: PositionSpread) -> str:
    return f"{spread.first:,}" if spread.first == spread.last else f"{spread.first:,} to {spread.last:,}"


def _loss_cell(spread: PositionSpread | None) -> str:
    if spread is None:
        return "-"
    loss = spread.loss
    return f"{loss.mean:.3f}" + (f" ({loss.low:.3f} to {loss.high:.3f})" if loss.low < loss.high else "")


def _describe_rises(curves: PositionCurves, train_length: int) -> str:
    rises = {curve: find_lasting_rise(by_length, train_length) for curve, by_length in curves.items()}
    found = []
    for curve, rise in rises.items():
        if rise is not None:
            at_end = _rise_of(curves[curve][max(curves[curve])][-1], curves[curve], train_length)
            found.append(f"{METHOD_NAMES[curve]} from {rise.first:,} tokens seen on ({at_end:+.1%} in the last range)")
    stays = [METHOD_NAMES[curve] for curve, rise in rises.items() if rise is None]
    above = f"more than {FLAT:.0%} above that of the first row, from some range on to the end of the window"
    if not found:
        return f"Beyond the training length no mean loss is {above}."
    others = f" Not so: {', '.join(stays)}." if stays else ""
    return f"Beyond the training length the mean loss is {above}: {'; '.join(found)}.{others}"

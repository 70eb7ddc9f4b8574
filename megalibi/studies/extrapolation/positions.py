"""The loss by tokens seen in windows longer than those of the training: ranges of positions, and where the loss rises.

A longer window can have a higher loss at every position or past some number of tokens seen; the loss of whole windows
does not tell which.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megalibi.evaluate.by_position import PositionBin, PositionRange, align_ranges
from megalibi.report.markdown import format_table
from megalibi.studies.extrapolation.spread import Spread
from megalibi.studies.extrapolation.study import METHOD_NAMES
from megalibi.studies.finding import FLAT

PositionColumns = Mapping[int, Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]]
"""Seed -> curve, by a key of METHOD_NAMES -> evaluation length -> losses as by_position.to_columns gives them."""
LASTING_RANGES = 2
"""A rise lasts if the last ranges of the longest window, at least this many, have it: one alone may have it by its
text, which is another than that of its neighbours."""
_LOSS_RISE_MAX = 700.0  # a number of floating point can be at most exp(709.78)


@dataclass(frozen=True, kw_only=True)
class PositionSpread(PositionRange):
    """The loss of the predictions of a range, over the seeds."""

    tokens: int
    """Number of predictions that were scored, of one seed."""
    loss: Spread
    """Mean cross entropy of the predictions over the seeds, in nats per token."""
    rises: tuple[float, ...]
    """How far the perplexity of each seed lies above its own at the end of windows of the training length, as a share
    of that; seeds in the order of the study."""


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
        curve: _spread_lengths(
            {
                length: [_cut_columns(of_seed[curve][length], train_length) for of_seed in columns.values()]
                for length in sorted({train_length, max(by_length)})
            },
            train_length,
        )
        for curve, by_length in first.items()
    }


def _spread_lengths(
    cuts: Mapping[int, Sequence[Sequence[PositionBin]]], train_length: int
) -> dict[int, list[PositionSpread]]:
    """Return the ranges of all seeds as one, by length; ``cuts`` has those of each seed."""
    ends = [ranges[-1].loss for ranges in cuts[train_length]]
    return {
        length: [
            PositionSpread(
                first=ranges[0].first,
                last=ranges[0].last,
                tokens=ranges[0].tokens,
                loss=Spread.of_values([r.loss for r in ranges]),
                rises=tuple(
                    math.exp(min(r.loss - end, _LOSS_RISE_MAX)) - 1.0 for r, end in zip(ranges, ends, strict=True)
                ),
            )
            for ranges in zip(*of_seeds, strict=True)
        ]
        for length, of_seeds in cuts.items()
    }


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


def find_lasting_rises(
    by_length: Mapping[int, Sequence[PositionSpread]], train_length: int
) -> list[PositionSpread | None] | None:
    """Return for each seed the first range beyond the training length from which the loss is too high to the end.

    Too high is a perplexity more than FLAT above that at the end of windows of the training length. A seed has None
    if fewer than LASTING_RANGES ranges up to the end are so. The result is None if the window has fewer than that
    beyond the training length: then nothing can be said.

    Args:
        by_length: One curve of spread_positions.
        train_length: Tokens that the models were trained at.
    """
    beyond = [spread for spread in by_length[max(by_length)] if spread.last > train_length]
    if len(beyond) < LASTING_RANGES:
        return None
    return [_find_lasting_rise(beyond, seed) for seed in range(len(beyond[0].rises))]


def _find_lasting_rise(beyond: Sequence[PositionSpread], seed: int) -> PositionSpread | None:
    high = list(itertools.takewhile(lambda spread: spread.rises[seed] > FLAT, reversed(beyond)))
    return high[-1] if len(high) >= LASTING_RANGES else None


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
        name = f"{ends[shown[0]].words}, in windows of {train_length:,}"
        rows.append([name, f"{ends[shown[0]].tokens:,}", *(_loss_cell(ends[curve]) for curve in shown)])
    for some, found in align_ranges({curve: curves[curve].get(longest, ()) for curve in shown}):
        rows.append([some.words, f"{some.tokens:,}", *(_loss_cell(found.get(curve)) for curve in shown)])
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


def _loss_cell(spread: PositionSpread | None) -> str:
    if spread is None:
        return "-"
    loss = spread.loss
    return f"{loss.mean:.3f}" + (f" ({loss.low:.3f} to {loss.high:.3f})" if loss.low < loss.high else "")


def _describe_rises(curves: PositionCurves, train_length: int) -> str:
    groups: dict[str, list[str]] = {"In every seed": [], "In no seed": [], "Seeds disagree": [], "Nothing is known": []}
    for curve, by_length in curves.items():
        name, of_seeds = METHOD_NAMES[curve], find_lasting_rises(by_length, train_length)
        if of_seeds is None:
            groups["Nothing is known"].append(f"{name} (too few ranges beyond the training length)")
            continue
        found = [rise.first for rise in of_seeds if rise is not None]
        if not found:
            groups["In no seed"].append(name)
        elif len(found) < len(of_seeds):
            groups["Seeds disagree"].append(f"{name} ({len(found)} of {len(of_seeds)} say yes)")
        else:
            rises = by_length[max(by_length)][-1].rises
            end = f"{sum(rises) / len(rises):+.1%} in the last range"
            groups["In every seed"].append(f"{name} from {max(found):,} tokens seen on ({end})")
    rule = (
        "Where the loss rises beyond the training length: where the perplexity, exp(loss), is more than "
        f"{FLAT:.0%} above that of the first row in every range from there to the end of the window, and in at least "
        f"{LASTING_RANGES}, each of which is other text than the first row."
    )
    return " ".join([rule, *(f"{words}: {'; '.join(names)}." for words, names in groups.items() if names)])

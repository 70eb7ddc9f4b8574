from __future__ import annotations

import math

import numpy as np
import pytest

from megalibi.evaluate.by_position import to_columns
from megalibi.studies.extrapolation.plot import loss_by_position_figure
from megalibi.studies.extrapolation.positions import (
    PositionSpread,
    find_lasting_rises,
    format_position_curves,
    spread_positions,
)
from megalibi.studies.extrapolation.spread import Spread


def columns_of(losses: list[float], tokens: int = 2) -> dict[str, list[float]]:
    """The columns of a window with this loss at each position."""
    return to_columns(np.array([np.array(losses) * tokens, np.full(len(losses), float(tokens))]))


@pytest.mark.parametrize(
    ("train_length", "longest", "lasts"),
    [
        (4, 4, [1, 2, 4]),
        (4, 32, [1, 2, 4, 8, 16, 32]),
        (6, 20, [1, 2, 3, 6, 12, 20]),
        (1, 5, [1, 2, 4, 5]),
        (256, 16384, [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]),  # neighbours share a value
    ],
)
def test_ranges_double_from_the_training_length_and_hold_every_prediction(
    train_length: int, longest: int, lasts: list[int]
) -> None:
    by_length = {train_length: columns_of([1.0] * train_length), longest: columns_of(list(map(float, range(longest))))}
    ranges = spread_positions({1: {"alibi": by_length}}, train_length)["alibi"][longest]
    assert [r.last for r in ranges] == lasts
    assert [r.first for r in ranges] == [1, *(last + 1 for last in lasts[:-1])]
    assert [r.tokens for r in ranges] == [2 * (r.last - r.first + 1) for r in ranges]
    if longest > train_length:
        assert [r.loss.mean for r in ranges] == pytest.approx([(r.first + r.last) / 2 - 1 for r in ranges])


def test_seeds_are_a_mean_with_its_ends_and_lengths_between_are_left_out() -> None:
    losses = {1: [3.0, 3.0, 5.0, 7.0], 2: [3.0, 3.0, 7.0, 9.0], 5: [6.0, 3.0, 3.0, 5.0]}
    columns = {
        seed: {"none": {2: columns_of(values[:2]), 3: columns_of(values[:3]), 4: columns_of(values)}}
        for seed, values in losses.items()
    }
    curve = spread_positions(columns, 2)["none"]
    assert list(curve) == [2, 4]
    same, threefold, fifty_fold = 0.0, math.exp(3.0) - 1.0, math.exp(5.0) - 1.0
    assert curve[4] == [
        PositionSpread(
            first=1, last=1, tokens=2, loss=Spread(mean=4.0, low=3.0, high=6.0), rises=(same, same, threefold)
        ),
        PositionSpread(first=2, last=2, tokens=2, loss=Spread(mean=3.0, low=3.0, high=3.0), rises=(same, same, same)),
        PositionSpread(
            first=3,
            last=4,
            tokens=4,
            loss=Spread(mean=6.0, low=4.0, high=8.0),
            rises=(threefold, fifty_fold, math.e - 1.0),
        ),
    ]


def rising_curve(*of_seeds: list[float]) -> dict[int, list[PositionSpread]]:
    """ALiBi's curve of seeds whose loss is 4 at the end of windows of 2 tokens, and beyond as given by range."""
    columns = {
        seed: {
            "alibi": {
                2: columns_of([5.0, 4.0]),
                2 ** (len(beyond) + 1): columns_of(
                    [5.0, 4.0, *(x for n, x in enumerate(beyond) for _ in range(2 << n))]
                ),
            }
        }
        for seed, beyond in enumerate(of_seeds)
    }
    return spread_positions(columns, 2)["alibi"]


ABOVE, BELOW = 4.0 + math.log(1.031), 4.0 + math.log(1.029)
"""Losses whose perplexities are 3.1% and 2.9% above that of a loss of 4; as nats they are both less than 1% above."""


@pytest.mark.parametrize(
    ("beyond", "first"),
    [
        ([ABOVE, ABOVE, ABOVE], 3),
        ([BELOW, ABOVE, ABOVE], 5),
        ([ABOVE, BELOW, ABOVE], None),  # the first and the last range alone were too high by their texts
        ([ABOVE, ABOVE, BELOW], None),
        ([3.0, 3.0, 3.0], None),
    ],
)
def test_a_rise_lasts_to_the_end_of_the_window_in_two_ranges_or_more(beyond: list[float], first: int | None) -> None:
    rises = find_lasting_rises(rising_curve(beyond), 2)
    assert rises is not None
    assert [rise and rise.first for rise in rises] == [first]


def test_each_seed_has_a_rise_of_its_own_and_one_range_says_nothing() -> None:
    rises = find_lasting_rises(rising_curve([ABOVE] * 3, [BELOW, ABOVE, ABOVE], [3.0, ABOVE, BELOW]), 2)
    assert rises is not None
    assert [rise and rise.first for rise in rises] == [3, 5, None]
    assert find_lasting_rises(rising_curve([9.0]), 2) is None


def test_the_page_says_what_all_seeds_say() -> None:
    curves = {
        "sinusoidal": rising_curve([ABOVE] * 3, [BELOW, ABOVE, ABOVE]),
        "rotary": rising_curve([ABOVE] * 3, [3.0] * 3),
        "alibi": rising_curve([3.0, 9.0, 3.0], [3.0] * 3),
        "none": rising_curve([9.0], [9.0]),
    }
    assert list(format_position_curves(curves, 2))[-1].endswith(
        ", and in at least 2, each of which is other text than the first row. In every seed: sinusoidal from 5 tokens "
        "seen on (+3.1% in the last range). In no seed: ALiBi. Seeds disagree: rotary (1 of 2 say yes). Nothing is "
        "known: none (too few ranges beyond the training length)."
    )


def test_the_page_has_a_row_for_each_range_and_says_where_the_loss_rises() -> None:
    short = columns_of([6.0, 5.0], tokens=8)
    curves = spread_positions(
        {
            seed: {
                "alibi": {2: short, 8: columns_of([6.0, 5.1, 5.0, 5.0, 5.0, 5.0, 4.0, 4.0])},
                "sinusoidal": {2: short, 8: columns_of([6.0, 5.0, 6.0, 6.0 + seed, 7.5, 7.5, 7.5, 7.5])},
                "alibi_interpolated": {2: short, 8: columns_of([6.0, 5.0, 5.0, 5.0, 5.5, 5.5, 5.5, 5.5])},
                "learned": {2: short},
            }
            for seed in (0, 1)
        },
        2,
    )
    lines = list(format_position_curves(curves, 2))
    assert [line for line in lines if line.startswith("|") and "--" not in line] == [
        "| tokens seen | predictions | sinusoidal | ALiBi | ALiBi interpolated | learned |",
        "| 2, in windows of 2 | 8 | 5.000 | 5.000 | 5.000 | 5.000 |",
        "| 1 | 2 | 6.000 | 6.000 | 6.000 | - |",
        "| 2 | 2 | 5.000 | 5.100 | 5.000 | - |",
        "| 3 to 4 | 4 | 6.250 (6.000 to 6.500) | 5.000 | 5.000 | - |",
        "| 5 to 8 | 8 | 7.500 | 4.500 | 5.500 | - |",
    ]
    assert lines[-1] == (
        "Where the loss rises beyond the training length: where the perplexity, exp(loss), is more than 3% above that "
        "of the first row in every range from there to the end of the window, and in at least 2, each of which is "
        "other text than the first row. In every seed: sinusoidal from 3 tokens seen on (+1118.2% in the last range). "
        "In no seed: ALiBi; ALiBi interpolated."
    )
    learned = list(format_position_curves({"learned": curves["learned"]}, 2))
    assert learned[2:4] == ["| 1 | 8 | 6.000 |", "| 2 | 8 | 5.000 |"]
    assert not any("beyond" in line or "first row" in line for line in learned)


def test_the_picture_has_a_line_for_each_curve_and_the_interpolated_one_is_dashed_alibi() -> None:
    columns = {"alibi": {2: columns_of([6.0, 5.0]), 8: columns_of([6.0, *[5.0] * 7])}}
    columns["alibi_interpolated"] = {2: columns_of([6.0, 5.0]), 8: columns_of([6.0, *[5.5] * 7])}
    columns["learned"] = {2: columns_of([6.0, 5.0])}  # it has no windows of 8, which the axis promises
    (axes,) = loss_by_position_figure(spread_positions({1: columns}, 2), train_length=2).axes
    plain, scaled, train_length = axes.lines
    assert axes.get_xlabel() == "tokens seen, in windows of 8 (dashed: the training length, 2)"
    assert (plain.get_label(), scaled.get_label()) == ("ALiBi", "ALiBi interpolated")
    assert list(scaled.get_ydata()) == [6.0, 5.5, 5.5, 5.5]
    assert list(plain.get_xdata()) == pytest.approx([1.0, 2.0, 12**0.5, 40**0.5])
    assert plain.get_color() == scaled.get_color()
    assert plain.get_linestyle() != scaled.get_linestyle()
    assert set(train_length.get_xdata()) == {2}

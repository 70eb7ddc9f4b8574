from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megalibi.evaluate.by_position import VALUES_MAX, bin_positions, format_positions, to_columns


def sums_of(length: int, first_scored: int = 0) -> NDArray[np.float64]:
    """Two tokens of loss p at each scored position p."""
    sums_2S = np.zeros((2, length))
    sums_2S[0, first_scored:] = 2.0 * np.arange(first_scored, length)
    sums_2S[1, first_scored:] = 2.0
    return sums_2S


def test_bins_double_and_hold_every_token() -> None:
    bins = bin_positions(sums_of(21))
    assert [(b.first, b.last) for b in bins] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 21)]
    assert [b.loss for b in bins] == [0.0, 1.0, 2.5, 5.5, 11.5, 18.0]
    assert [b.tokens for b in bins] == [2, 2, 4, 8, 16, 10]


@pytest.mark.parametrize("length", [1, 2, 3, 64, 97, 1000])
@pytest.mark.parametrize("per_doubling", [1, 2, 4])
def test_finer_bins_leave_nothing_out(length: int, per_doubling: int) -> None:
    bins = bin_positions(sums_of(length), per_doubling=per_doubling)
    assert [b.first for b in bins] == [1, *(b.last + 1 for b in bins[:-1])]
    assert bins[-1].last == length
    assert sum(b.tokens for b in bins) == 2 * length


def test_a_sliding_window_has_no_bins_before_its_stride() -> None:
    assert [(b.first, b.last) for b in bin_positions(sums_of(16, first_scored=10))] == [(9, 16)]


def test_columns_are_every_position_up_to_a_length_and_stretches_beyond() -> None:
    columns = to_columns(sums_of(5, first_scored=2))
    assert columns == {"seen": [3, 4, 5], "loss": [2.0, 3.0, 4.0], "tokens": [2, 2, 2]}
    long = to_columns(sums_of(2 * VALUES_MAX + 1))
    assert long["seen"][:2] == [3, 6]
    assert long["loss"][:2] == [1.0, 4.0]
    assert sum(long["tokens"]) == 2 * (2 * VALUES_MAX + 1)
    assert len(long["seen"]) <= VALUES_MAX


def test_the_table_has_a_column_for_each_length() -> None:
    lines = format_positions({4: bin_positions(sums_of(4)), 6: bin_positions(sums_of(6))}).splitlines()
    assert [line.split() for line in lines] == [
        ["tokens", "seen", "4", "6"],
        ["1", "0.0000", "0.0000"],
        ["2", "1.0000", "1.0000"],
        ["3", "to", "4", "2.5000", "2.5000"],
        ["5", "to", "6", "-", "4.5000"],
    ]

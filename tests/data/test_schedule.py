from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalibi.data.schedule import BlendSchedule
from megalibi.errors import ConfigError

weights = st.lists(st.one_of(st.integers(1, 40), st.decimals("0.01", "3", places=2).map(float)), min_size=1, max_size=6)


@given(weights)
def test_every_prefix_is_within_one_sample_of_the_weights(weights):
    schedule = BlendSchedule(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    length = min(3 * schedule.period + 5, 20_000)
    numbers, _ = schedule.locate(np.arange(length))
    prefixes = np.arange(1, length + 1)
    for number, weight in enumerate(weights):
        share = Fraction(str(weight)) / total
        counts = np.cumsum(numbers == number)
        # |count - prefix * share| < 1, in whole numbers
        deviations = np.abs(counts * share.denominator - prefixes * share.numerator)
        assert deviations.max() < share.denominator


@given(weights)
def test_every_set_is_read_in_its_own_order(weights):
    schedule = BlendSchedule(weights)
    numbers, set_indices = schedule.locate(np.arange(min(3 * schedule.period, 5_000)))
    for number in range(len(weights)):
        rows = np.flatnonzero(numbers == number)
        assert set_indices[rows].tolist() == list(range(len(rows)))
        for set_index, position in list(enumerate(rows.tolist()))[:20]:
            assert schedule.position_of(number, set_index) == position


def test_far_away_indices_need_no_walk():
    schedule = BlendSchedule([0.7, 0.2, 0.1])
    numbers, set_indices = schedule.locate(np.array([10**15]))
    assert numbers.tolist() == [0]
    assert set_indices.tolist() == [7 * 10**14]


def test_decimals_are_taken_as_written():
    assert BlendSchedule([0.1, 0.2, 0.7]).period == 10
    assert BlendSchedule([1, 1]).period == 2
    assert BlendSchedule([0.333333, 0.666667]).period == 1_000_000


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights(weight):
    with pytest.raises(ConfigError, match="each must be a finite number above 0"):
        BlendSchedule([1.0, weight])


def test_too_long_a_period_names_weights_that_work():
    with pytest.raises(
        ConfigError, match=r"repeat only after 4444444\d* samples .*round them, for example to \["
    ) as error:
        BlendSchedule([1234567.0, 3209877.3])
    rounded = str(error.value).partition("for example to ")[2]
    assert BlendSchedule(json.loads(rounded)).period <= 2**20


def test_a_weight_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="repeat only after"):
        BlendSchedule([1e-30, 1.0])

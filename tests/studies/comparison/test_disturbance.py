from __future__ import annotations

import pytest

from megalibi.studies.comparison.disturbance import find_disturbance, find_slow_turns, relative_range


@pytest.mark.parametrize(
    ("medians", "disturbance", "slow"),
    [
        ((1.0, 1.0, 1.0), "", []),
        ((1.0, 1.02, 1.0499), "", []),
        ((1.0, 1.0, 1.06), "disturbed, 6.0% between its turns", [3]),
        ((9.0, 2.0, 2.1, 3.0), "disturbed, 274.5% between its turns", [1, 4]),  # 7 over the median of 2.55
        ((1.0, 1.0), "too few turns (2, not 3)", []),
        ((1.0,), "too few turns (1, not 3)", []),
        ((1.0, 2.0), "too few turns (2, not 3)", [2]),
    ],
)
def test_turns_by_hand(medians: tuple[float, ...], disturbance: str, slow: list[int]) -> None:
    turns = dict(enumerate(medians, start=1))
    assert find_disturbance(turns) == disturbance
    assert find_slow_turns(turns) == slow


def test_a_machine_twice_as_slow_is_as_even() -> None:
    assert relative_range({1: 2.0, 2: 4.0, 3: 3.0}) == relative_range({1: 4.0, 2: 8.0, 3: 6.0}) == pytest.approx(2 / 3)

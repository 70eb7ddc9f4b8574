from __future__ import annotations

import numpy as np
import pytest

from megalibi.studies.comparison.disturbance import find_disturbance, find_disturbed_turns, mean_difference


@pytest.mark.parametrize(
    ("medians", "others", "disturbance", "again"),
    [
        ((1.0, 1.0, 1.0), (), "", []),
        ((1.0, 1.02, 1.05), (), "", []),  # differences of 0.02, 0.03 and 0.05 over 1.02
        ((1.0, 1.0, 1.06), (), "disturbed, 4.0% between its turns", [3]),
        ((9.0, 2.0, 2.05, 3.0), (), "disturbed, 144.9% between its turns", [1, 4]),  # 21.95 over 6 pairs and 2.525
        ((1.0, 1.0), (), "too few turns (2, not 3)", []),
        ((1.0,), (), "too few turns (1, not 3)", []),
        ((1.0, 2.0), (), "too few turns (2, not 3)", [2]),
        ((1.0, 1.0, 1.0), (0.1, 0.25, 0.9), "", []),  # the median is not above 0.25
        ((1.0, 1.0, 1.0), (0.5, 0.1, 0.9), "disturbed, 0.50 cores busy with other work", [1, 3]),
        ((1.0, 1.1, 1.0), (0.4,), "disturbed, 6.7% between its turns, 0.40 cores busy with other work", [1, 2]),
    ],
)
def test_turns_by_hand(
    medians: tuple[float, ...], others: tuple[float, ...], disturbance: str, again: list[int]
) -> None:
    turns, other_busy_cores = (dict(enumerate(values, start=1)) for values in (medians, others))
    assert find_disturbance(turns, other_busy_cores) == disturbance
    assert find_disturbed_turns(turns, other_busy_cores) == again


def test_a_machine_twice_as_slow_is_as_even() -> None:
    for factor in (1.0, 2.0):
        turns = {n: factor * seconds for n, seconds in {1: 2.0, 2: 4.0, 3: 3.0}.items()}
        assert mean_difference(turns) == pytest.approx(4 / 9)
    assert mean_difference({1: 2.0}) == 0.0


def test_more_turns_of_one_machine_do_not_lie_further_apart() -> None:
    random = np.random.default_rng(1)
    three, twelve = (
        np.mean([mean_difference(dict(enumerate(random.normal(1.0, 0.02, count)))) for _ in range(1000)])
        for count in (3, 12)
    )
    assert twelve == pytest.approx(three, rel=0.05)

from __future__ import annotations

from megalibi.studies.extrapolation.spread import Spread, mean_curves, spread_curves


def test_a_curve_is_the_mean_of_the_seeds_and_keeps_the_ends() -> None:
    seeds = {seed: {"sliding": {"alibi": {8: value, 16: 7.0}}} for seed, value in ((3, 1.0), (1, 2.0), (2, 6.0))}
    assert spread_curves(seeds)["sliding"]["alibi"] == {
        8: Spread(mean=3.0, low=1.0, high=6.0),
        16: Spread(mean=7.0, low=7.0, high=7.0),
    }
    assert mean_curves(seeds) == {"sliding": {"alibi": {8: 3.0, 16: 7.0}}}

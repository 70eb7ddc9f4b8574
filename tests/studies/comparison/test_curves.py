from __future__ import annotations

import math

import pytest

from megalibi.studies.comparison.curves import Curve, Point, compare_times, mean_speedup, stand_at
from megalibi.studies.comparison.report.tables import paper_levels
from megalibi.studies.comparison.study import ALIBI, SINUSOIDAL, ComparedModel


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(updates=n, hours=hours, perplexity=perplexity) for n, (hours, perplexity) in enumerate(pairs)]


def test_perplexity_falls_linearly_in_its_logarithm_between_checkpoints() -> None:
    curve = Curve(points((1.0, 400.0), (3.0, 100.0)))
    assert curve.hours_to(200.0) == pytest.approx(2.0)  # the geometric mean, half way
    assert curve.perplexity_at(2.0) == pytest.approx(200.0)
    assert (curve.highest, curve.lowest) == (pytest.approx(400.0), pytest.approx(100.0))


def test_a_checkpoint_no_better_than_an_earlier_one_is_left_out() -> None:
    curve = Curve(points((1.0, 400.0), (2.0, 200.0), (3.0, 300.0), (4.0, 200.0), (5.0, 100.0)))
    assert curve.hours_to(200.0) == pytest.approx(2.0)
    assert curve.hours_to(100.0 * math.sqrt(2.0)) == pytest.approx(3.5)  # between 2 and 5 hours
    assert curve.lowest == pytest.approx(100.0)


def test_levels_are_the_baselines_at_five_even_moments_of_what_both_reach() -> None:
    # The baseline halves every hour; the model starts later but is twice as fast, and ends above the baseline's end.
    baseline = points(*((hour, 1024.0 / 2**hour) for hour in range(1, 8)))
    model = points((0.75, 512.0), (2.25, 64.0), (2.75, 32.0))
    levels = compare_times(model, baseline)
    assert [level.perplexity for level in levels] == pytest.approx([512.0, 256.0, 128.0, 64.0, 32.0])
    assert [level.baseline_hours for level in levels] == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    assert [level.hours for level in levels] == pytest.approx([0.75, 1.25, 1.75, 2.25, 2.75])
    by_hand = [1 / 0.75 - 1, 2 / 1.25 - 1, 3 / 1.75 - 1, 4 / 2.25 - 1, 5 / 2.75 - 1]
    assert [level.speedup for level in levels] == pytest.approx(by_hand)
    assert mean_speedup(levels) == pytest.approx(sum(by_hand) / 5)


def test_equal_curves_are_equally_fast() -> None:
    curve = points((1.0, 90.0), (2.0, 50.0), (4.0, 30.0))
    assert mean_speedup(compare_times(curve, curve)) == pytest.approx(0.0)


def test_a_clock_that_runs_half_as_fast_halves_the_speed() -> None:
    curve = points((1.0, 90.0), (2.0, 50.0), (4.0, 30.0))
    late = points((2.0, 90.0), (4.0, 50.0), (8.0, 30.0))
    assert mean_speedup(compare_times(late, curve)) == pytest.approx(-0.5)


def test_curves_without_a_perplexity_in_common_have_no_levels() -> None:
    assert compare_times(points((1.0, 90.0), (2.0, 50.0)), points((1.0, 40.0), (2.0, 30.0))) == []
    assert compare_times(points((1.0, 90.0)), points((1.0, 95.0))) == []


def test_a_run_stopped_at_a_time_stands_between_its_checkpoints() -> None:
    curve = points((1.0, 90.0), (2.0, 50.0), (4.0, 32.0))
    between = stand_at(curve, 3.0)
    assert between is not None
    assert (between.updates, between.hours) == (pytest.approx(1.5), 3.0)
    assert between.perplexity == pytest.approx(40.0)  # the geometric mean, half way
    assert stand_at(curve, 1.0) == curve[0]
    assert stand_at(curve, 4.0) == stand_at(curve, 9.0) == curve[2]
    assert stand_at(curve, 0.5) is None


def test_a_checkpoint_that_got_worse_is_where_its_run_stands() -> None:
    curve = points((1.0, 90.0), (2.0, 25.0), (4.0, 36.0))
    between = stand_at(curve, 3.0)
    assert between is not None
    assert between.perplexity == pytest.approx(30.0)


def test_the_papers_figure_5_gives_what_was_found_in_it() -> None:
    # 10.1% over evenly spaced perplexities, from 13.6% to 7.1%; -1% to -2% for the shorter pair: our moments are
    # evenly spaced in time instead.
    long, short = (
        paper_levels((ComparedModel(method=ALIBI, length=length), ComparedModel(method=SINUSOIDAL, length=2 * length)))
        for length in (1024, 512)
    )
    assert mean_speedup(long) == pytest.approx(0.101, abs=0.002)
    assert [long[0].speedup, long[-1].speedup] == pytest.approx([0.136, 0.071], abs=0.001)
    assert -0.02 < mean_speedup(short) < -0.01

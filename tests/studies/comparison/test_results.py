"""The paper's own numbers, put in as if we had measured them, come out of the results."""

from __future__ import annotations

import json

import pytest

from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.results import format_percent
from megalibi.studies.comparison.study import ALIBI, SINUSOIDAL, variants
from tests.support.paper_comparison import PAIR, STUDY, UPDATES, empty_results, paper_results, slow_alibi_results


def test_the_papers_ratios_come_out() -> None:
    results = paper_results()
    gain = results.rate_gain(*PAIR, "unfused")
    assert gain is not None
    assert gain.median == pytest.approx(0.131, abs=0.001)
    assert results.memory_saving(*PAIR, "unfused") == pytest.approx(0.106, abs=0.001)
    assert results.hours(PAIR[0], "fast") == pytest.approx(5973, rel=0.001)


def test_after_equal_time_the_sinusoidal_model_is_where_table_11_has_it() -> None:
    equal = paper_results().equal_time(PAIR, "unfused")
    assert equal is not None
    assert equal.alibi is not None
    assert (equal.alibi.updates, equal.alibi.perplexity) == (UPDATES, 8.92)
    assert equal.sinusoidal is not None
    assert equal.stopped == SINUSOIDAL
    assert equal.sinusoidal.updates == pytest.approx(44_200, abs=50)
    # Figure 5's last checkpoint by then is 9.01, after all 50,000 updates it is 8.83 (Table 12).
    share = (equal.sinusoidal.updates - 44_000) / 6_000
    assert equal.sinusoidal.perplexity == pytest.approx(9.01 * (8.83 / 9.01) ** share)


def test_an_alibi_that_is_slower_is_the_one_stopped_early() -> None:
    results = slow_alibi_results(1.25)
    equal = results.equal_time(PAIR, "fast")
    assert equal is not None
    assert equal.alibi is not None
    assert equal.sinusoidal is not None
    assert equal.stopped == ALIBI
    assert equal.hours == equal.alibi.hours == equal.sinusoidal.hours == results.hours(PAIR[1], "fast")
    assert (equal.sinusoidal.updates, equal.sinusoidal.perplexity) == (UPDATES, 8.83)
    assert equal.alibi.updates == pytest.approx(UPDATES / 1.25)
    assert equal.alibi.perplexity > 8.92
    page = format_comparison(results, facts=[], picture=None)
    assert "come down: sinusoidal, 1,024 beside ALiBi, 512 (unfused); " in page
    assert "ALiBi, 1,024 beside sinusoidal, 2,048 (fast). " in page
    assert "sinusoidal, 2,048 beside" not in page
    assert "| 40,000 |" in page


def test_two_that_end_at_once_are_not_stopped() -> None:
    results = slow_alibi_results(1.0)
    equal = results.equal_time(PAIR, "fast")
    assert equal is not None
    assert equal.stopped is None
    assert "ALiBi, 1,024 beside" not in format_comparison(results, facts=[], picture=None)
    assert "Stopped early" not in format_comparison(empty_results(), facts=[], picture=None)


def test_every_number_is_in_the_json() -> None:
    fields = json.loads(json.dumps(paper_results().to_json()))
    (pair,) = [p for p in fields["pairs"] if (p["alibi"], p["attention"]) == ("alibi_1024", "unfused")]
    assert pair["update_rate_gain"]["median"] == pytest.approx(0.131, abs=0.001)
    assert len(pair["levels"]) == 5
    assert pair["mean_speedup"] > 0.0
    assert pair["mean_speedup_at_equal_speed"] < 0.0
    assert set(fields["speed"]) == {variant.name for variant in variants(STUDY)}
    assert fields["quality"]["sinusoidal_512"]["perplexity_by_updates_and_length"]["50000"]["2048"] == 105.42


def test_percent_has_no_negative_zero() -> None:
    assert [format_percent(value) for value in (-0.0001, 0.0862, -0.02)] == ["0.0%", "8.6%", "-2.0%"]
    assert [format_percent(value, sign="+") for value in (-0.0001, 0.0862)] == ["+0.0%", "+8.6%"]


def test_methods_are_the_papers() -> None:
    assert {model.method for model in STUDY.models()} == {ALIBI, SINUSOIDAL}

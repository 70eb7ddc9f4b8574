"""The paper's own numbers, put in as if we had measured them, come out of the tables and pass the rules."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megalibi.metrics.summary import Quartiles
from megalibi.plan.memory_trace import MemoryByKind
from megalibi.studies.comparison.findings import judge
from megalibi.studies.comparison.plot import training_curves
from megalibi.studies.comparison.quality import Quality
from megalibi.studies.comparison.report import write_report
from megalibi.studies.comparison.results import Results, format_percent
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, CompareStudy, Model, Variant, variants
from megalibi.studies.paper import get_curves, get_table

STUDY = CompareStudy(lengths=(512, 1024, 2048), valid_tokens=649_000)
PAIR = STUDY.pairs()[-1]
UPDATES = 50_000
HOURS_OF_1000 = {"sinusoidal_1024": 118.7, "alibi_512": 110.9, "sinusoidal_2048": 135.1, "alibi_1024": 119.5}
"""Spacing of Figure 5's markers; at equal length the methods take equal time (Table 12)."""


def paper_quality(model: Model) -> Quality:
    """Table 12's row as the last checkpoint, Figure 5's curve, if it has one, before it."""
    row = get_table(12).row(method=model.method, train_length=model.length)
    last = {length: row[str(length)] for length in STUDY.lengths if row[str(length)] is not None}
    perplexities = {UPDATES: last}
    for figure, length in (("5 left", 1024), ("5 right", 2048)):
        for hours, perplexity in get_curves(figure).get(model.name, ()):
            updates = 1000 * round(hours / HOURS_OF_1000[model.name])
            if updates < UPDATES:
                perplexities[updates] = {length: perplexity}
    return Quality(model=model, wall_seconds=3600.0, perplexities=perplexities)


def paper_speed(variant: Variant) -> Speed:
    row = get_table(12).row(method=variant.model.method, train_length=variant.model.length)
    name = {512: "alibi_512", 1024: "alibi_1024", 2048: "sinusoidal_2048"}[variant.model.length]
    seconds = HOURS_OF_1000[name] * 3.6
    zeros = dict.fromkeys(MemoryByKind.__dataclass_fields__, 0)
    memory = MemoryByKind(**{**zeros, "attention_workspace": int(row["memory_gb"] * 1e9)})
    return Speed(
        variant=variant,
        step_seconds=Quartiles(low=seconds, median=seconds, high=seconds),
        turn_medians={1: seconds},
        batch_tokens=1000,
        memory=memory,
        device_bytes=32 * 10**9,
    )


def paper_results() -> Results:
    return Results(
        study=STUDY,
        updates=UPDATES,
        plans={},
        speeds={variant: paper_speed(variant) for variant in variants(STUDY)},
        qualities={model: paper_quality(model) for model in STUDY.models()},
    )


def empty_results() -> Results:
    return Results(study=STUDY, updates=UPDATES, plans={}, speeds={}, qualities={})


def change_quality(results: Results, model: Model, perplexities: dict[int, dict[int, float]]) -> Results:
    quality = Quality(model=model, wall_seconds=1.0, perplexities=perplexities)
    return dataclasses.replace(results, qualities={**results.qualities, model: quality})


def test_the_papers_own_numbers_pass_every_rule() -> None:
    findings = judge(paper_results())
    assert len(findings) == len(ATTENTIONS) * 6 + 3
    assert [finding.expected for finding in findings if not finding.holds] == []


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


def slow_alibi_results(slowness: float) -> Results:
    """The paper's numbers, with ALiBi at 1,024 so much slower than sinusoidal positions at 2,048."""
    results = paper_results()
    speeds = dict(results.speeds)
    for attention in ATTENTIONS:
        other = results.speeds[Variant(model=PAIR[1], attention=attention)]
        seconds = slowness * other.step_seconds.median
        variant = Variant(model=PAIR[0], attention=attention)
        speeds[variant] = dataclasses.replace(
            other,
            variant=variant,
            turn_medians={1: seconds},
            step_seconds=Quartiles(low=seconds, median=seconds, high=seconds),
        )
    return dataclasses.replace(results, speeds=speeds)


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
    page = write_report(results, facts=[], picture=None)
    assert "come down: sinusoidal, 1,024 beside ALiBi, 512 (unfused); " in page
    assert "ALiBi, 1,024 beside sinusoidal, 2,048 (fast). " in page
    assert "sinusoidal, 2,048 beside" not in page
    assert "| 40,000 |" in page


def test_two_that_end_at_once_are_not_stopped() -> None:
    results = slow_alibi_results(1.0)
    equal = results.equal_time(PAIR, "fast")
    assert equal is not None
    assert equal.stopped is None
    assert "ALiBi, 1,024 beside" not in write_report(results, facts=[], picture=None)
    assert "Stopped early" not in write_report(empty_results(), facts=[], picture=None)


def test_a_model_without_a_checkpoint_by_then_is_not_judged() -> None:
    results = change_quality(slow_alibi_results(1.25), PAIR[0], {UPDATES: {2048: 8.92}})
    equal = results.equal_time(PAIR, "fast")
    assert equal is not None
    assert equal.alibi is None
    assert not [finding for finding in judge(results) if "after equal time" in finding.expected]
    assert "| ALiBi, 1,024 | fast |" in write_report(results, facts=[], picture=None)


@pytest.mark.parametrize(
    ("alibi", "sinusoidal", "expected", "holds"),
    [
        (8.92, 8.83, "after equal updates", True),
        (9.02, 8.83, "after equal updates", False),
        (8.64, 8.83, "after equal updates", False),  # better by more than is called the same
    ],
)
def test_equal_updates_by_hand(alibi: float, sinusoidal: float, expected: str, holds: bool) -> None:
    results = empty_results()
    for model, perplexity in zip(PAIR, (alibi, sinusoidal), strict=True):
        results = change_quality(results, model, {UPDATES: {2048: perplexity}})
    (finding,) = judge(results)
    assert finding.expected.startswith(expected)
    assert finding.holds is holds


def test_a_slower_alibi_fails_what_says_faster() -> None:
    findings = judge(slow_alibi_results(1.1))
    failed = [finding.expected for finding in findings if not finding.holds]
    for words in ("more updates an hour", "less memory", "faster on average", "after equal time"):
        assert sum(words in expected for expected in failed) == len(ATTENTIONS), words


def test_nothing_measured_is_nothing_judged_and_a_page_of_dashes() -> None:
    results = empty_results()
    assert judge(results) == []
    page = write_report(results, facts=["Facts."], picture=None)
    assert "Nothing is measured yet." in page
    assert "| ALiBi, 1,024 | - | - |" in page
    assert not results.has_curves


def test_the_page_says_what_the_papers_11_percent_are_and_has_its_numbers_beside() -> None:
    page = write_report(paper_results(), facts=["Facts."], picture="figure5.png")
    assert '"11% faster" is the time to a given perplexity' in page
    assert "which is 13.1% higher: 50.0k against 44.2k" in page
    for caveat in (
        "Sinusoidal tables are scaled to the token embeddings' initial standard deviation",
        "does not see scratch memory inside native C++",
        "everything on that GPU, other processes too",
        "the first one is a first checkpoint's, and shows the learning rate's warm-up too",
    ):
        assert page.count(caveat) == 1
    assert '"11% less memory" is 26.2 against 29.3 GB, 10.6% less' in page
    assert "![Perplexity against hours of training, ALiBi and sinusoidal positions](figure5.png)" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| ALiBi, 512 | 24.6 | 24.6 |")]
    assert row.endswith("| 9.79 | 9.30 | 9.54 | - | - | *24.6* | *5.5k* | *9.79* | *9.3* | *9.54* |")
    (gains,) = [line for line in page.splitlines() if line.startswith("| ALiBi, 1,024 against") and "*+13.1%*" in line]
    assert gains.count("+13.1% [+13.1%, +13.1%]") == len(ATTENTIONS)
    assert gains.count("10.6% (-)") == len(ATTENTIONS)


def test_other_lengths_have_no_paper_beside() -> None:
    study = dataclasses.replace(STUDY, lengths=(512, 1024))
    page = write_report(dataclasses.replace(empty_results(), study=study), facts=[], picture=None)
    assert "*26.2*" not in page


def test_every_number_is_in_the_json() -> None:
    fields = json.loads(json.dumps(paper_results().to_json()))
    (pair,) = [p for p in fields["pairs"] if (p["alibi"], p["attention"]) == ("alibi_1024", "unfused")]
    assert pair["update_rate_gain"]["median"] == pytest.approx(0.131, abs=0.001)
    assert len(pair["levels"]) == 5
    assert pair["mean_speedup"] > 0.0
    assert set(fields["speed"]) == {variant.name for variant in variants(STUDY)}
    assert fields["quality"]["sinusoidal_512"]["perplexity_by_updates_and_length"]["50000"]["2048"] == 105.42


def test_figure_5_has_both_clocks_and_both_pairs() -> None:
    results = paper_results()
    assert results.has_curves
    figure = training_curves(results)
    assert [axes.get_title() for axes in figure.axes] == [
        f"evaluated at {length}, {attention} attention" for attention in ATTENTIONS for length in ("1,024", "2,048")
    ]
    assert all(len(axes.lines) == 2 for axes in figure.axes)
    alibi = figure.axes[1].lines[0]
    assert alibi.get_label() == "ALiBi, 1,024"
    assert (alibi.get_xdata()[-1], alibi.get_ydata()[-1]) == (pytest.approx(5975), 8.92)  # type: ignore[index]


def test_percent_has_no_negative_zero() -> None:
    assert [format_percent(value) for value in (-0.0001, 0.0862, -0.02)] == ["0.0%", "8.6%", "-2.0%"]
    assert [format_percent(value, sign="+") for value in (-0.0001, 0.0862)] == ["+0.0%", "+8.6%"]


def test_methods_are_the_papers() -> None:
    assert {model.method for model in STUDY.models()} == {ALIBI, SINUSOIDAL}

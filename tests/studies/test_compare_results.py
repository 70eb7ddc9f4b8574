"""The paper's own numbers, put in as if we had measured them, come out of the tables and pass the rules."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megalibi.report.run import Quartiles
from megalibi.studies.compare import ALIBI, ATTENTIONS, SINUSOIDAL, CompareStudy, Model, Variant, variants
from megalibi.studies.compare_findings import judge
from megalibi.studies.compare_plot import training_curves
from megalibi.studies.compare_quality import Quality
from megalibi.studies.compare_report import write_report
from megalibi.studies.compare_results import Results, format_percent
from megalibi.studies.compare_speed import Speed
from megalibi.studies.memory import MemoryByKind
from megalibi.studies.published import get_curves, get_table

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
    assert (equal.alibi.updates, equal.alibi.perplexity) == (UPDATES, 8.92)
    assert equal.sinusoidal is not None
    assert (equal.sinusoidal.updates, equal.sinusoidal.perplexity) == (44_000, 9.01)


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
    results = paper_results()
    slow = {variant: speed for variant, speed in results.speeds.items() if variant.model == PAIR[1]}
    swapped = {
        Variant(model=PAIR[0], attention=variant.attention): dataclasses.replace(
            speed, turn_medians={1: 1.1 * speed.turn_medians[1]}, step_seconds=Quartiles(low=0, median=540, high=0)
        )
        for variant, speed in slow.items()
    }
    findings = judge(dataclasses.replace(results, speeds={**results.speeds, **swapped}))
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

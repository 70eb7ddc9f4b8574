"""The paper's own numbers, put in as if we had measured them, pass the rules; others do not."""

from __future__ import annotations

import pytest

from megalibi.studies.comparison.report.findings import judge_comparison
from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, ComparedModel
from megalibi.studies.finding import Finding
from tests.support.paper_comparison import (
    PAIR,
    UPDATES,
    change_quality,
    change_turns,
    empty_results,
    paper_results,
    slow_alibi_results,
)


def test_the_papers_own_numbers_pass_every_rule() -> None:
    findings = judge_comparison(paper_results())
    assert len(findings) == len(ATTENTIONS) * 6 + 3
    assert [finding.expected for finding in findings if not finding.holds] == []


def test_a_model_without_a_checkpoint_by_then_is_not_judged() -> None:
    results = change_quality(slow_alibi_results(1.25), PAIR[0], {UPDATES: {2048: 8.92}})
    equal = results.equal_time(PAIR, "fast")
    assert equal is not None
    assert equal.alibi is None
    assert not [finding for finding in judge_comparison(results) if "after equal time" in finding.expected]
    assert "| ALiBi, 1,024 | fast |" in format_comparison(results, facts=[], picture=None)


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
    (finding,) = judge_comparison(results)
    assert finding.expected.startswith(expected)
    assert finding.holds is holds


def test_a_slower_alibi_fails_what_says_faster() -> None:
    findings = judge_comparison(slow_alibi_results(1.1))
    failed = [finding.expected for finding in findings if not finding.holds]
    for words in ("more updates an hour", "less memory", "faster on average", "after equal time"):
        assert sum(words in expected for expected in failed) == len(ATTENTIONS), words


BY_SPEED = ("more updates an hour", "the same time", "faster on average", "after equal time")
"""Words of the statements that rest on speeds."""
BY_TIME = BY_SPEED[2:]
"""Those of them that say when a model is as good as another."""


def undecided(results: Results) -> dict[tuple[str, str], str]:
    """The reasons of what is not decided, by words of the statement and kind of attention."""

    def words_of(finding: Finding) -> str:
        (words,) = [words for words in BY_SPEED if words in finding.expected]
        return words

    found = [finding for finding in judge_comparison(results) if finding.holds is None]
    return {(words_of(finding), finding.measured.split()[0]): finding.reason for finding in found}


def test_a_disturbed_speed_decides_nothing_that_rests_on_it_and_all_else_stays() -> None:
    sound = judge_comparison(paper_results())
    results = change_turns(paper_results(), PAIR[1], "unfused", 1.0, 1.3, 0.9)
    reason = "sinusoidal, 2,048: disturbed, 40.0% between its turns"
    assert undecided(results) == {
        ("more updates an hour", "unfused"): reason,
        ("the same time", "unfused"): f"{reason}; some turns are within 3% and some are not",
        ("faster on average", "unfused"): reason,
        ("after equal time", "unfused"): reason,
    }
    judged = {str(f) for f in judge_comparison(results) if f.holds is not None}
    assert judged == {str(f) for f in sound} - {str(f) for f in sound if f.measured.startswith("unfused") and any(
        words in f.expected for words in BY_SPEED)}  # fmt: skip


def test_a_speed_no_pair_needs_disturbs_the_comparison_at_equal_length_alone() -> None:
    results = change_turns(paper_results(), ComparedModel(method=ALIBI, length=512), "fast", 1.0, 1.0, 1.051)
    assert undecided(results) == {("the same time", "fast"): "ALiBi, 512: disturbed, 5.1% between its turns"}


def test_two_turns_are_too_few_for_all_that_rests_on_speed() -> None:
    results = paper_results()
    for model in (*PAIR, ComparedModel(method=SINUSOIDAL, length=512)):
        results = change_turns(results, model, "fast", 1.0, 1.0)
    found = undecided(results)
    assert set(found) == {(words, "fast") for words in BY_SPEED}
    assert found["more updates an hour", "fast"] == "ALiBi, 1,024 and sinusoidal, 2,048: too few turns (2, not 3)"
    assert found["the same time", "fast"].startswith("sinusoidal, 512 and ")


@pytest.mark.parametrize(("alibi", "apart"), [(8.83 * 1.049, ""), (8.83 * 0.951, ""), (8.83 * 0.94, "6.0%")])
def test_an_alibi_that_learns_better_is_no_result_about_speed(alibi: float, apart: str) -> None:
    curve = {n: {2048: alibi * (1.0 + (UPDATES - n) / UPDATES)} for n in range(1000, UPDATES + 1, 1000)}
    results = change_quality(paper_results(), PAIR[0], curve)
    found = undecided(results)
    expected = {(words, kind) for words in BY_TIME for kind in ATTENTIONS} if apart else set()
    assert set(found) == expected
    assert set(found.values()) == ({f"after equal updates the two lie {apart} apart"} if apart else set())
    page = format_comparison(results, facts=[], picture=None)
    assert page.count("No result about speed: after equal updates") == len(expected) // 4


@pytest.mark.parametrize(
    ("turns", "holds"),
    [
        ((1.0, 1.0, 1.045), True),  # the quartiles of three turns lie half way to the outer ones
        ((1.0, 1.045, 1.045), None),
        ((1.04, 1.045, 1.045), False),
    ],
)
def test_turns_that_disagree_about_the_same_time_do_not_decide_it(turns: tuple[float, ...], holds: bool | None) -> None:
    results = change_turns(paper_results(), ComparedModel(method=ALIBI, length=2048), "fast", *turns)
    found = [f for f in judge_comparison(results) if "same time" in f.expected and f.measured.startswith("fast")]
    reason = "some turns are within 3% and some are not" if holds is None else ""
    assert [(f.holds, f.reason) for f in found] == [(holds, reason)]


def test_a_single_training_is_said_where_models_are_compared() -> None:
    (equal,) = [f for f in judge_comparison(paper_results()) if "after equal updates" in f.expected]
    assert equal.measured.endswith(": +1.0%, one training each")
    page = format_comparison(paper_results(), facts=[], picture=None)
    assert page.count("(n = 1)") == 2
    assert "put its training lengths in no order" in page

"""The paper's own numbers, put in as if we had measured them, pass the rules; others do not."""

from __future__ import annotations

import pytest

from megalibi.studies.comparison.report.findings import AS_FAST, judge_comparison
from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, ComparedModel
from megalibi.studies.finding import Finding
from tests.support.paper_comparison import (
    PAIR,
    UPDATES,
    change_quality,
    change_speed,
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
    reason = "sinusoidal, 2,048: disturbed, 26.7% between its turns"
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
    results = change_turns(paper_results(), ComparedModel(method=ALIBI, length=512), "fast", 1.0, 1.0, 1.06)
    assert undecided(results) == {("the same time", "fast"): "ALiBi, 512: disturbed, 4.0% between its turns"}


def test_two_turns_are_too_few_for_all_that_rests_on_speed() -> None:
    results = paper_results()
    for model in (*PAIR, ComparedModel(method=SINUSOIDAL, length=512)):
        results = change_turns(results, model, "fast", 1.0, 1.0)
    found = undecided(results)
    assert set(found) == {(words, "fast") for words in BY_SPEED}
    assert found["more updates an hour", "fast"] == "ALiBi, 1,024 and sinusoidal, 2,048: too few turns (2, not 3)"
    assert found["the same time", "fast"].startswith("sinusoidal, 512 and ")


def learning(results: Results, share: float) -> Results:
    """The results, with ALiBi's perplexity so many times that of the sinusoidal model after as many updates."""
    curve = results.qualities[PAIR[1]].perplexities
    return change_quality(results, PAIR[0], {n: {2048: share * by_length[2048]} for n, by_length in curve.items()})


@pytest.mark.parametrize(
    ("share", "slowness", "holds"),
    [
        (0.96, 1.0, None),  # 4% better after equal updates, which is more than a quarter of the time, and as fast
        (0.96, 0.8, None),  # and faster: how much of it is speed is not told apart
        (0.96, 2.0, False),  # and so slow that it is not earlier
        (1.0, 0.8, True),
        (1.0, 1.0, False),
        (1.01, 0.8, True),  # as in the paper: a little worse after equal updates, and earlier
        (1.1, 0.9, False),
    ],
)
def test_what_updates_of_equal_time_would_show_too_is_no_result_about_speed(
    share: float, slowness: float, holds: bool | None
) -> None:
    results = learning(slow_alibi_results(slowness), share)
    found = [f for f in judge_comparison(results) if any(words in f.expected for words in BY_TIME)]
    assert [f.holds for f in found] == [holds] * len(BY_TIME) * len(ATTENTIONS)
    assert {f.reason.partition(" by ")[0] for f in found} == ({""} if holds is not None else {"earlier", "better"})


def test_how_much_earlier_it_would_be_by_learning_alone_is_said() -> None:
    assert set(undecided(learning(slow_alibi_results(1.0), 0.96)).values()) == {
        f"{what} {AS_FAST}" for what in ("earlier by 27.1%", "better by 4.0%")
    }
    page = format_comparison(learning(slow_alibi_results(0.5), 0.96), facts=[], picture=None)
    assert "ALiBi, 1,024 against sinusoidal, 2,048 +27.1%. So much of these shares is how well the two learn" in page
    assert "equally long" not in format_comparison(empty_results(), facts=[], picture=None)


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


def test_turns_that_were_replaced_are_said_beside_what_rests_on_them() -> None:
    results = paper_results()
    assert "anew" not in format_comparison(results, facts=[], picture=None).partition("## Speed and memory")[0]
    for attention, count in (("fast", 2), ("unfused", 1)):
        results = change_speed(results, PAIR[1], attention, turns_replaced=count)
    results = change_speed(results, PAIR[0], "fast", turns_replaced=1)
    said = {(words, f.measured.split()[0]): f.measured.rpartition("; ")[2] for f in judge_comparison(results)
            for words in BY_SPEED if words in f.expected}  # fmt: skip
    assert said == {
        (words, attention): measured
        for words in BY_SPEED
        for attention, measured in (("fast", "3 turns measured anew"), ("unfused", "1 turn measured anew"))
    }
    assert [f.holds for f in judge_comparison(results)] == [f.holds for f in judge_comparison(paper_results())]
    assert "4 turns measured anew by hand (`--again`)" in format_comparison(results, facts=[], picture=None)


def test_a_single_training_is_said_where_models_are_compared() -> None:
    (equal,) = [f for f in judge_comparison(paper_results()) if "after equal updates" in f.expected]
    assert equal.measured.endswith(": +1.0%, one training each")
    page = format_comparison(paper_results(), facts=[], picture=None)
    assert page.count("(n = 1)") == 2
    assert "put its training lengths in no order" in page

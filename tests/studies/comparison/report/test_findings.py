"""The paper's own numbers, put in as if we had measured them, pass the rules; others do not."""

from __future__ import annotations

import pytest

from megalibi.studies.comparison.report.findings import judge_comparison
from megalibi.studies.comparison.report.page import format_comparison
from megalibi.studies.comparison.study import ATTENTIONS
from tests.support.paper_comparison import (
    PAIR,
    UPDATES,
    change_quality,
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

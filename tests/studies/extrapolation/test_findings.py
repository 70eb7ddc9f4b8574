from __future__ import annotations

import pytest

from megalibi.studies.extrapolation.findings import find_rise, judge_extrapolation, relative
from megalibi.studies.extrapolation.study import PROTOCOLS
from tests.support.paper_curves import METHODS, paper_curves


def flat_curves(**changes: dict[int, float]) -> dict[str, dict[str, dict[int, float]]]:
    lines = {method: {8: 100.0, 16: 100.0, 32: 100.0} for method in METHODS} | changes
    return dict.fromkeys(PROTOCOLS, lines)


@pytest.mark.parametrize("train_length", [512, 1024])
def test_the_papers_own_numbers_pass_every_rule(train_length: int) -> None:
    findings = judge_extrapolation(paper_curves(train_length), train_length)
    assert len(findings) == 6
    assert [finding.expected for finding in findings if not finding.holds] == []


def test_flat_curves_pass_only_what_says_flat() -> None:
    held = [finding.expected for finding in judge_extrapolation(flat_curves(), 8) if finding.holds]
    assert len(held) == 2
    assert all("ALiBi is flat" in expected for expected in held)


@pytest.mark.parametrize(
    ("method", "curve", "expected", "holds"),
    [
        ("sinusoidal", {8: 100.0, 16: 150.0, 32: 199.0}, "explode", False),
        ("sinusoidal", {8: 100.0, 16: 150.0, 32: 200.0}, "explode", True),
        ("rotary", {8: 100.0, 16: 110.0, 32: 102.0}, "rotary positions degrade", False),
        ("t5_bias", {8: 100.0, 16: 103.5, 32: 120.0}, "extrapolates further", False),
        ("alibi", {8: 100.0, 16: 104.0, 32: 90.0}, "flat or falls", False),
        ("alibi", {8: 100.0, 16: 70.0, 32: 60.0}, "flat or falls", True),
        ("alibi", {8: 100.0, 16: 70.0, 32: 60.0}, "flat under sliding", False),
        ("alibi", {8: 100.0, 16: 98.0, 32: 102.0}, "flat under sliding", True),
        ("alibi", {8: 100.0, 16: 98.0, 32: 102.0}, "is the best", False),
    ],
)
def test_each_rule_by_hand(method: str, curve: dict[int, float], expected: str, holds: bool) -> None:
    (finding,) = [
        finding for finding in judge_extrapolation(flat_curves(**{method: curve}), 8) if expected in finding.expected
    ]
    assert finding.holds is holds


def test_t5_bias_that_never_rises_is_further_than_rotary_that_does() -> None:
    curves = flat_curves(rotary={8: 100.0, 16: 101.0, 32: 110.0})
    (finding,) = [f for f in judge_extrapolation(curves, 8) if "extrapolates further" in f.expected]
    assert finding.holds
    assert finding.measured == "T5 bias at no length; rotary at 32"


def test_only_what_was_measured_is_judged() -> None:
    curves = {protocol: {"alibi": {8: 10.0, 16: 9.0}, "none": {8: 11.0, 16: 30.0}} for protocol in PROTOCOLS}
    assert len(judge_extrapolation(curves, 8)) == 2
    assert judge_extrapolation({protocol: {"learned": {8: 10.0}} for protocol in PROTOCOLS}, 8) == []


def test_rise_and_ratio() -> None:
    curve = {8: 100.0, 16: 102.9, 32: 103.1, 64: 101.0}
    assert find_rise(curve, 8) == 32
    assert relative(curve, 8)[16] == pytest.approx(1.029)

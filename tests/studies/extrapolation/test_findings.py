from __future__ import annotations

import pytest

from megalibi.studies.extrapolation.findings import CLOSE, find_rise, judge_extrapolation, relative
from megalibi.studies.extrapolation.study import PROTOCOLS, Curves
from megalibi.studies.extrapolation.sweep import Sweep
from megalibi.studies.finding import Finding
from tests.support.paper_curves import METHODS, paper_curves

INSIDE = Sweep(losses={0.001: 5.0, 0.002: 4.0, 0.004: 5.0})
SWEEPS = dict.fromkeys(METHODS, INSIDE)


def flat_curves(**changes: dict[int, float]) -> dict[str, dict[str, dict[int, float]]]:
    lines = {method: {8: 100.0, 16: 100.0, 32: 100.0} for method in METHODS} | changes
    return dict.fromkeys(PROTOCOLS, lines)


def judge_by_name(expected: str, *seeds: Curves) -> Finding:
    """Judge the curves of one or several seeds, and return the finding with these words."""
    (finding,) = [f for f in judge_extrapolation(dict(enumerate(seeds)), 8, SWEEPS) if expected in f.expected]
    return finding


@pytest.mark.parametrize("train_length", [512, 1024])
def test_the_papers_own_numbers_pass_every_rule(train_length: int) -> None:
    findings = judge_extrapolation({1: paper_curves(train_length)}, train_length, SWEEPS)
    assert len(findings) == 7
    assert [finding.expected for finding in findings if not finding.holds] == []


def test_flat_curves_pass_only_what_says_flat() -> None:
    first, *findings = judge_extrapolation({1: flat_curves()}, 8, SWEEPS)
    assert "0.00% apart" in first.measured
    held = [finding.expected for finding in findings if finding.holds]
    assert len(held) == 2
    assert all("ALiBi is flat" in expected for expected in held)
    assert all(finding.holds is not None for finding in findings)


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
    assert judge_by_name(expected, flat_curves(**{method: curve})).holds is holds


def test_t5_bias_that_never_rises_is_further_than_rotary_that_does() -> None:
    finding = judge_by_name("extrapolates further", flat_curves(rotary={8: 100.0, 16: 101.0, 32: 110.0}))
    assert finding.holds
    assert finding.measured == "T5 bias at no length; rotary at 32"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("perplexity", "is_close"), [(105.0, True), (105.1, False)])
def test_nothing_is_decided_when_a_method_lies_apart(method: str, perplexity: float, is_close: bool) -> None:
    """Whichever of the paper's methods it is; without positions there is no baseline to give its best."""
    apart = flat_curves(none={8: 150.0, 16: 150.0, 32: 150.0}, **{method: dict.fromkeys((8, 16, 32), perplexity)})
    span, *findings = judge_extrapolation({1: apart}, 8, SWEEPS)
    assert span.holds is is_close
    assert f"{CLOSE:.0%}" in span.rule
    assert f"{perplexity:.2f} at 8: {perplexity / 100 - 1:.2%} apart" in span.measured
    assert len(findings) == 6
    assert all((finding.holds is not None) is is_close for finding in findings)
    assert {finding.reason for finding in findings} == ({""} if is_close else {"see the first finding"})


def test_the_span_is_that_of_the_means() -> None:
    low, high = (flat_curves(alibi=dict.fromkeys((8, 16, 32), value)) for value in (92.0, 108.0))
    span, *findings = judge_extrapolation({1: low, 2: high}, 8, SWEEPS)
    assert span.holds
    assert all(finding.holds is not None for finding in findings if "best" not in finding.expected)


EXPLODED, NEARLY = {8: 100.0, 16: 150.0, 32: 210.0}, {8: 100.0, 16: 150.0, 32: 196.0}


@pytest.mark.parametrize(
    ("curves", "holds", "reason"),
    [
        ((EXPLODED, EXPLODED), True, ""),
        ((NEARLY, NEARLY, NEARLY), False, ""),
        ((EXPLODED, NEARLY), None, "1 of 2 seeds say yes"),  # though their mean, 203, has exploded
        ((EXPLODED, EXPLODED, NEARLY), None, "2 of 3 seeds say yes"),
    ],
)
def test_seeds_that_disagree_decide_nothing(
    curves: tuple[dict[int, float], ...], holds: bool | None, reason: str
) -> None:
    finding = judge_by_name("explode", *(flat_curves(sinusoidal=curve) for curve in curves))
    assert (finding.holds, finding.reason) == (holds, reason)
    mean = sum(curve[32] for curve in curves) / len(curves)
    assert f"{mean:.2f} at 32" in finding.measured


AT_EDGE, TOO_FEW = Sweep(losses={0.001: 4.0, 0.002: 5.0, 0.004: 5.0}), Sweep(losses={0.001: 4.0, 0.002: 5.0})


def test_a_rate_at_the_edge_of_its_sweep_decides_nothing() -> None:
    span, *findings = judge_extrapolation({1: flat_curves()}, 8, SWEEPS | {"alibi": AT_EDGE, "none": AT_EDGE})
    assert span.holds
    assert "nor is it if the learning rate of one of them is at the edge of its sweep" in span.rule
    assert {(f.holds, f.reason) for f in findings} == {(None, "ALiBi: learning rate at the edge of the sweep")}
    of_none = judge_extrapolation({1: flat_curves()}, 8, SWEEPS | {"none": AT_EDGE})  # no method of the paper
    assert all(f.holds is not None for f in of_none)


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        (INSIDE, ""),
        (AT_EDGE, "ALiBi: learning rate at the edge of the sweep"),
        (TOO_FEW, "fewer than 3 learning rates tried"),
        (Sweep(losses={0.001: 4.0}), "fewer than 3 learning rates tried"),
    ],
)
def test_a_single_method_is_judged_by_the_same_rule(sweep: Sweep, reason: str) -> None:
    alone = {protocol: {"alibi": lines["alibi"]} for protocol, lines in flat_curves().items()}
    findings = judge_extrapolation({1: alone}, 8, {"alibi": sweep})
    assert [(f.holds, f.reason) for f in findings] == [(None if reason else True, reason)] * 2


def test_interpolated_slopes_take_part_in_no_finding() -> None:
    curves = flat_curves(alibi={8: 100.0, 16: 98.0, 32: 97.5})
    beside = {p: {**lines, "alibi_interpolated": {8: 150.0, 16: 30.0, 32: 10.0}} for p, lines in curves.items()}
    assert judge_extrapolation({1: beside}, 8, SWEEPS) == judge_extrapolation({1: curves}, 8, SWEEPS)


def test_only_what_was_measured_is_judged() -> None:
    curves = {protocol: {"alibi": {8: 10.0, 16: 9.0}, "none": {8: 11.0, 16: 30.0}} for protocol in PROTOCOLS}
    assert len(judge_extrapolation({1: curves}, 8, SWEEPS)) == 2
    assert judge_extrapolation({1: {protocol: {"learned": {8: 10.0}} for protocol in PROTOCOLS}}, 8, {}) == []


def test_rise_and_ratio() -> None:
    curve = {8: 100.0, 16: 102.9, 32: 103.1, 64: 101.0}
    assert find_rise(curve, 8) == 32
    assert relative(curve, 8)[16] == pytest.approx(1.029)

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from megalibi.errors import ConfigError
from megalibi.studies import paper
from megalibi.studies.extrapolation.plot import extrapolation_figure
from megalibi.studies.extrapolation.report import find_published, nearest_train_length, write_report
from megalibi.studies.extrapolation.results import (
    PROTOCOLS,
    ExtrapolationStudy,
    Finding,
    find_rise,
    judge,
    method_config,
    relative,
)
from tests.support.runs import make_config

METHODS = ("sinusoidal", "rotary", "t5_bias", "alibi")


def paper_curves(train_length: int) -> dict[str, dict[str, dict[int, float]]]:
    curves = {p: {m: paper.extrapolation(m, train_length, p) for m in METHODS} for p in PROTOCOLS}
    return {p: {m: curve for m, curve in lines.items() if curve} for p, lines in curves.items()}


def flat_curves(**changes: dict[int, float]) -> dict[str, dict[str, dict[int, float]]]:
    lines = {method: {8: 100.0, 16: 100.0, 32: 100.0} for method in METHODS} | changes
    return dict.fromkeys(PROTOCOLS, lines)


def make_study(**changes: Any) -> ExtrapolationStudy:
    fields: dict[str, Any] = {"methods": ("alibi", "learned"), "lengths": (33, 66), "stride": 3}
    fields |= {"nonoverlapping_tokens": 500, "sliding_tokens": 100} | changes
    return ExtrapolationStudy(**fields)


@pytest.mark.parametrize("train_length", [512, 1024])
def test_the_papers_own_numbers_pass_every_rule(train_length: int) -> None:
    findings = judge(paper_curves(train_length), train_length)
    assert len(findings) == 6
    assert [finding.expected for finding in findings if not finding.holds] == []


def test_flat_curves_pass_only_what_says_flat() -> None:
    held = [finding.expected for finding in judge(flat_curves(), 8) if finding.holds]
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
    (finding,) = [finding for finding in judge(flat_curves(**{method: curve}), 8) if expected in finding.expected]
    assert finding.holds is holds


def test_t5_bias_that_never_rises_is_further_than_rotary_that_does() -> None:
    curves = flat_curves(rotary={8: 100.0, 16: 101.0, 32: 110.0})
    (finding,) = [f for f in judge(curves, 8) if "extrapolates further" in f.expected]
    assert finding.holds
    assert finding.measured == "T5 bias at no length; rotary at 32"


def test_only_what_was_measured_is_judged() -> None:
    curves = {protocol: {"alibi": {8: 10.0, 16: 9.0}, "none": {8: 11.0, 16: 30.0}} for protocol in PROTOCOLS}
    assert len(judge(curves, 8)) == 2
    assert judge({protocol: {"learned": {8: 10.0}} for protocol in PROTOCOLS}, 8) == []


def test_rise_and_ratio() -> None:
    curve = {8: 100.0, 16: 102.9, 32: 103.1, 64: 101.0}
    assert find_rise(curve, 8) == 32
    assert relative(curve, 8)[16] == pytest.approx(1.029)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("alibi", "rope")}, "study.methods: rope is not allowed"),
        ({"methods": ("alibi", "alibi")}, "each once"),
        ({"methods": ()}, "one or more"),
        ({"lengths": (64, 33)}, "rising whole numbers"),
        ({"lengths": (0, 33)}, "rising whole numbers"),
        ({"stride": 34}, "study.stride=34 is not allowed: 1 to 33"),
        ({"sliding_tokens": 66}, "study.sliding_tokens=66 is not allowed: more than 66"),
        ({"ranks": 0}, "study.ranks=0"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(**changes)


def test_study_and_run_agree_on_the_training_length_and_the_text() -> None:
    base = make_config("tokens", data={"valid": "tokens"})
    make_study().check_base(base)
    with pytest.raises(ConfigError, match=r"study.lengths=\[40, 66\] does not begin with data.seq_length=33"):
        make_study(lengths=(40, 66)).check_base(base)
    with pytest.raises(ConfigError, match=r"data.valid has 0 token files"):
        make_study().check_base(make_config("tokens"))


def test_methods_differ_in_their_positions_and_folders_alone() -> None:
    base = make_config("tokens", train={"output_dir": "runs/study"})
    config = method_config(base, "rotary")
    assert (config.model.position_method, config.train.output_dir) == ("rotary", "runs/study/rotary")
    assert method_config(base, "alibi").model == base.model
    assert method_config(base, "alibi").optimizer == base.optimizer


def test_learned_positions_end_at_the_training_length() -> None:
    base = make_config("tokens")
    assert method_config(base, "learned").model.max_position_embeddings == 33
    assert make_study().lengths_of("learned") == (33,)
    assert make_study().lengths_of("alibi") == (33, 66)


def test_the_papers_nearest_row_is_at_the_same_multiple() -> None:
    assert [nearest_train_length(length) for length in (64, 256, 700, 1024, 8192)] == [512, 512, 512, 1024, 3072]
    assert find_published("alibi", "nonoverlapping", 2.0, 512) == (1012, 18.73)
    assert find_published("alibi", "nonoverlapping", 16.0, 512) == (8512, 18.34)
    assert find_published("alibi", "sliding", 4.0, 512) == (2048, 18.28)
    assert find_published("alibi", "sliding", 16.0, 512) is None
    assert find_published("none", "nonoverlapping", 2.0, 512) is None


def test_the_page_has_every_number_with_the_papers_beside() -> None:
    curves = {protocol: {"sinusoidal": {256: 50.0, 512: 123456.0}, "none": {256: 40.25}} for protocol in PROTOCOLS}
    page = write_report(curves, judge(curves, 256), train_length=256, stride=64, facts=["Facts."])
    rows = [line for line in page.splitlines() if re.match(r"\| [\d,]+ \(", line)]
    assert rows == [
        "| 256 (1 x) | 50.00 | 40.25 | 512 (1 x) | 20.05 |",
        "| 512 (2 x) | 1.23e+05 | - | 1,012 (1.98 x) | 43.54 |",
        "| 256 (1 x) | 50.00 | 40.25 | 512 (1 x) | 18.35 |",
        "| 512 (2 x) | 1.23e+05 | - | 1,024 (2 x) | 204.42 |",
    ]
    assert "| yes | sinusoidal positions explode past the training length |" in page
    assert "Its ALiBi trained at 256: 21.29 at 256" in page
    assert "so only the shapes can be compared" in page


def test_the_picture_writes_what_lies_beyond_its_axis() -> None:
    curves = paper_curves(512)
    figure = extrapolation_figure(curves, train_length=512, stride=1)
    for axes, protocol in zip(figure.axes, PROTOCOLS, strict=True):
        top = axes.get_ylim()[1]
        written = {text.get_text() for text in axes.texts} - {"beyond"}
        assert written == {f"{v:,.0f}" for curve in curves[protocol].values() for v in curve.values() if v > top}
        assert len(written) > 3


def test_a_finding_is_one_line_that_begins_with_the_verdict() -> None:
    finding = Finding(expected="it is flat", rule="none", measured="1.00 to 1.01", holds=True)
    assert str(finding) == "as in the paper: it is flat: 1.00 to 1.01"
    assert str(dataclasses.replace(finding, holds=False)).startswith("NOT as in the paper: it is flat")

"""What the page of a study says was trained."""

from __future__ import annotations

from megalibi.studies.baselines import describe_sinusoidal, describe_t5_bias
from megalibi.studies.extrapolation.study import ExtrapolationStudy
from megalibi.studies.extrapolation.write import describe_extrapolation
from tests.support.runs import make_config


def make_study(*methods: str, interpolate_slopes: bool = False) -> ExtrapolationStudy:
    return ExtrapolationStudy(
        methods=methods,
        learning_rates=(1e-3, 2e-3),
        seeds=(1, 2),
        lengths=(33, 66),
        stride=8,
        nonoverlapping_tokens=100,
        sliding_tokens=90,
        interpolate_slopes=interpolate_slopes,
    )


def test_how_baselines_were_trained_is_said_where_there_are_any() -> None:
    base = make_config("tokens", model={"t5_bias_scale": 4.0})
    facts = describe_extrapolation(make_study("sinusoidal", "t5_bias", "alibi"), base, {})
    assert facts[-2:] == [describe_sinusoidal(base.model), describe_t5_bias(base.model)]
    assert "numbers times 4," in facts[-1]
    said = describe_extrapolation(make_study("alibi"), base, {})
    assert not any(fact.startswith(("Sinusoidal", "T5 bias")) for fact in said)


def test_interpolated_slopes_are_said_where_alibi_was_evaluated_with_them() -> None:
    base = make_config("tokens")
    said = describe_extrapolation(make_study("alibi", interpolate_slopes=True), base, {})[-1]
    assert said.startswith("ALiBi interpolated: the models of ALiBi, their slopes multiplied by 33 / length ")
    for study in (make_study("alibi"), make_study("rotary", interpolate_slopes=True)):
        assert not any("interpolated" in fact for fact in describe_extrapolation(study, base, {}))

"""What the page of a study says was trained."""

from __future__ import annotations

from megalibi.studies.extrapolation.study import ExtrapolationStudy
from megalibi.studies.extrapolation.write import describe_extrapolation
from tests.support.runs import make_config


def make_study(*methods: str) -> ExtrapolationStudy:
    return ExtrapolationStudy(
        methods=methods,
        learning_rates=(1e-3, 2e-3),
        seeds=(1, 2),
        lengths=(33, 66),
        stride=8,
        nonoverlapping_tokens=100,
        sliding_tokens=90,
    )


def test_which_sinusoidal_positions_were_trained_is_said_where_there_are_any() -> None:
    base = make_config("tokens")
    scaled = make_config("tokens", model={"position_method": "sinusoidal", "scale_embedding": True})
    study = make_study("sinusoidal", "alibi")
    assert describe_extrapolation(study, scaled, {})[-1].startswith("Sinusoidal: tokens multiplied by sqrt(")
    assert describe_extrapolation(study, base, {})[-1].startswith("Sinusoidal: a table scaled to the token embeddings'")
    assert not any("Sinusoidal" in fact for fact in describe_extrapolation(make_study("alibi"), base, {}))

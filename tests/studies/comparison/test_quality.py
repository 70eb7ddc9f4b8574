from __future__ import annotations

import pytest

from megalibi.errors import ConfigError
from megalibi.studies.comparison.curves import Point
from megalibi.studies.comparison.quality import Quality, check_quality
from megalibi.studies.comparison.study import ComparedModel
from tests.support.runs import make_config


@pytest.mark.parametrize(
    ("checkpoint", "valid", "message"),
    [
        (
            {"keep": 3, "every_steps": 5},
            "tokens",
            r"checkpoint.keep=3 with checkpoint.every_steps=5: must be keep=0",
        ),
        (
            {"keep": 0, "every_steps": 0},
            "tokens",
            r"checkpoint.keep=0 with checkpoint.every_steps=0: must be keep=0",
        ),
        ({"keep": 0, "every_steps": 5}, None, r"data.valid: must be one token file to evaluate on, not 0"),
    ],
)
def test_a_study_whose_curves_could_not_be_read_is_refused(
    checkpoint: dict[str, int], valid: str | None, message: str
) -> None:
    check_quality(make_config("tokens", data={"valid": "tokens"}, checkpoint={"keep": 0, "every_steps": 5}))
    with pytest.raises(ConfigError, match=message):
        check_quality(make_config("tokens", data={"valid": valid}, checkpoint=checkpoint))


def test_points_are_the_checkpoints_evaluated_at_a_length_by_rising_time() -> None:
    perplexities = {20: {32: 50.0, 64: 40.0}, 10: {64: 80.0}}
    quality = Quality(model=ComparedModel(method="alibi", length=32), wall_seconds=1.0, perplexities=perplexities)
    assert quality.points(64, 360.0) == [
        Point(updates=10, hours=1.0, perplexity=80.0),
        Point(updates=20, hours=2.0, perplexity=40.0),
    ]
    assert quality.points(32, 360.0) == [Point(updates=20, hours=2.0, perplexity=50.0)]
    assert (quality.updates, quality.final(64), quality.final(128)) == (20, 40.0, None)

from __future__ import annotations

import pytest

from megalibi.errors import ConfigError
from megalibi.evaluate.slope_scale import SlopeScale, check_slope_scale, parse_slope_scale
from tests.support.runs import make_config


def test_interpolation_keeps_the_bias_of_the_farthest_key_and_never_steepens() -> None:
    scale = parse_slope_scale("interpolate")
    assert scale == SlopeScale(None)
    assert [scale.at(length, 512) for length in (1, 511, 512, 513, 1024, 16384)] == [1, 1, 1, 512 / 513, 0.5, 0.03125]


@pytest.mark.parametrize(("text", "factor"), [("0.25", 0.25), ("2", 2.0), ("1e-6", 1e-6), ("1e6", 1e6)])
def test_a_number_holds_at_every_length(text: str, factor: float) -> None:
    scale = parse_slope_scale(text)
    assert scale is not None
    assert [scale.at(length, 512) for length in (1, 512, 16384)] == [factor] * 3


@pytest.mark.parametrize("text", ["", "yes", "0", "-1", "nan", "inf", "1e-7", "1e7", "None"])
def test_what_is_no_scale_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^--slope-scale={text}: must be none, interpolate or a number from 1e-06 to"
    ):
        parse_slope_scale(text)


@pytest.mark.parametrize(("text", "asked"), [("interpolate", "interpolate"), ("0.50", "0.5")])
def test_a_model_without_slopes_is_refused(text: str, asked: str) -> None:
    assert parse_slope_scale("none") is None
    rotary, alibi = (make_config("text", model={"position_method": method}) for method in ("rotary", "alibi"))
    check_slope_scale(rotary, parse_slope_scale("none"))
    check_slope_scale(alibi, parse_slope_scale(text))
    message = f"^--slope-scale={asked}: must be none with model.position_method=rotary of the checkpoint: alibi alone"
    with pytest.raises(ConfigError, match=message):
        check_slope_scale(rotary, parse_slope_scale(text))

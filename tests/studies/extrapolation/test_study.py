from __future__ import annotations

from typing import Any

import pytest

from megalibi.config import find_differences
from megalibi.errors import ConfigError
from megalibi.studies.extrapolation.study import INTERPOLATED, ExtrapolationStudy, method_config, trained_method
from tests.support.runs import make_config


def make_study(**changes: Any) -> ExtrapolationStudy:
    fields: dict[str, Any] = {"methods": ("alibi", "learned"), "lengths": (33, 66), "stride": 3}
    fields |= {"learning_rates": (1e-3, 2e-3), "seeds": (1, 2)}
    fields |= {"nonoverlapping_tokens": 500, "sliding_tokens": 100} | changes
    return ExtrapolationStudy(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("alibi", "rope")}, "study.methods=rope: must be some of "),
        ({"methods": ("alibi", "alibi")}, "must be one or more methods, each named once"),
        ({"methods": ()}, "must be one or more methods, each named once"),
        ({"learning_rates": ()}, r"study.learning_rates=\[\]: must be one or more rising numbers"),
        ({"learning_rates": (2e-3, 1e-3)}, r"study.learning_rates=\[0.002, 0.001\]: must be one or more rising"),
        ({"learning_rates": (1e-3, 1e-3)}, "must be one or more rising numbers"),
        ({"learning_rates": (0.0, 1e-3)}, "must be finite and above 0"),
        ({"learning_rates": (1e-3, float("inf"))}, "must be finite and above 0"),
        ({"seeds": ()}, r"study.seeds=\[\]: must be one or more whole numbers from 0 on, each named once"),
        ({"seeds": (1, 2, 1)}, "must be one or more whole numbers from 0 on, each named once"),
        ({"seeds": (1, -2)}, "must be one or more whole numbers from 0 on, each named once"),
        ({"lengths": (64, 33)}, "must be rising whole numbers above 0"),
        ({"lengths": (0, 33)}, "must be rising whole numbers above 0"),
        ({"stride": 34}, "study.stride=34: must be 1 to 33"),
        ({"sliding_tokens": 66}, "study.sliding_tokens=66: must be more than 66"),
        ({"ranks": 0}, "study.ranks=0: must be at least 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(**changes)


def test_study_and_run_agree_on_the_training_length_and_the_text() -> None:
    base = make_config("tokens", data={"valid": "tokens"})
    make_study().check_base(base)
    with pytest.raises(
        ConfigError, match=r"study.lengths=\[40, 66\]: must begin with the training length, data.seq_length=33"
    ):
        make_study(lengths=(40, 66)).check_base(base)
    with pytest.raises(ConfigError, match=r"data.valid: must be one token file to evaluate on, not 0"):
        make_study().check_base(make_config("tokens"))
    still = make_config("tokens", data={"valid": "tokens"}, optimizer={"learning_rate": 0.0, "min_learning_rate": 0.0})
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate=0.0: must be above 0"):
        make_study().check_base(still)


def test_runs_differ_in_positions_rates_seeds_and_folders_alone() -> None:
    optimizer = {"learning_rate": 2e-3, "min_learning_rate": 2e-4, "warmup_init_learning_rate": 1e-4}
    base = make_config("tokens", train={"output_dir": "runs/study", "seed": 1}, optimizer=optimizer)
    config = method_config(base, "rotary", 6e-3, 4)
    assert find_differences(base, config) == {
        "model.position_method": ("alibi", "rotary"),
        "optimizer.learning_rate": (2e-3, 6e-3),
        "optimizer.min_learning_rate": (2e-4, 6e-4),
        "optimizer.warmup_init_learning_rate": (1e-4, 3e-4),
        "train.seed": (1, 4),
        "train.output_dir": ("runs/study", "runs/study/rotary_lr_0.006_seed_4"),
    }
    scaled = make_config("tokens", model={"position_method": "sinusoidal", "scale_embedding": True})
    assert method_config(scaled, "sinusoidal", 1e-3, 1).model.scale_embedding
    assert not method_config(scaled, "alibi", 1e-3, 1).model.scale_embedding
    same = method_config(base, "alibi", 2e-3, 1)
    assert find_differences(base, same) == {"train.output_dir": ("runs/study", "runs/study/alibi_lr_0.002_seed_1")}


@pytest.mark.parametrize("rate", [1e-5, 7e-4, 0.1 + 0.2, 1 / 3])
def test_a_constant_rate_stays_constant(rate: float) -> None:
    """The lowest rate is no rounding error above the highest, which a configuration refuses."""
    base = make_config("tokens", optimizer={"learning_rate": 3e-3, "min_learning_rate": 3e-3})
    assert method_config(base, "alibi", rate, 1).optimizer.min_learning_rate == pytest.approx(rate, rel=1e-11)


def test_learned_positions_end_at_the_training_length() -> None:
    base = make_config("tokens")
    assert method_config(base, "learned", 1e-3, 1).model.max_position_embeddings == 33
    assert make_study().lengths_of("learned") == (33,)
    assert make_study().lengths_of("alibi") == (33, 66)


def test_interpolated_slopes_are_one_curve_more_of_the_same_models() -> None:
    assert make_study().curves == ("alibi", "learned")
    assert make_study(interpolate_slopes=True).curves == ("alibi", "learned", INTERPOLATED)
    assert make_study(interpolate_slopes=True, methods=("rotary",)).curves == ("rotary",)
    assert make_study().lengths_of(INTERPOLATED) == (33, 66)
    assert [trained_method(curve) for curve in ("learned", "alibi", INTERPOLATED)] == ["learned", "alibi", "alibi"]

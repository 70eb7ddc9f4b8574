from __future__ import annotations

from typing import Any

import pytest

from megalibi.errors import ConfigError
from megalibi.studies.extrapolation.study import ExtrapolationStudy, method_config
from tests.support.runs import make_config


def make_study(**changes: Any) -> ExtrapolationStudy:
    fields: dict[str, Any] = {"methods": ("alibi", "learned"), "lengths": (33, 66), "stride": 3}
    fields |= {"nonoverlapping_tokens": 500, "sliding_tokens": 100} | changes
    return ExtrapolationStudy(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("alibi", "rope")}, "study.methods=rope: must be some of "),
        ({"methods": ("alibi", "alibi")}, "must be one or more methods, each named once"),
        ({"methods": ()}, "must be one or more methods, each named once"),
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

from __future__ import annotations

from pathlib import Path

import pytest

from megalibi.config import Config, derive
from megalibi.errors import ConfigError
from megalibi.studies.comparison.study import ComparedModel, CompareStudy, model_config, variant_config, variants
from megalibi.studies.study import load_study
from tests.support.runs import make_config

CONFIGS = Path(__file__).parents[3] / "configs"
SCALES = ("smoke", "small", "1.3b", "1.3b_10min")


def make_base() -> Config:
    return make_config(
        "tokens",
        data={"seq_length": 64, "valid": "tokens"},
        train={"global_batch_size": 8, "micro_batch_size": 2, "eval_samples": 4, "output_dir": "runs/compare"},
    )


def make_study(**changes: object) -> CompareStudy:
    return CompareStudy(**{"lengths": (16, 32, 64), "valid_tokens": 1000, **changes})  # type: ignore[arg-type]


def test_models_differ_in_length_and_positions_and_see_as_many_tokens() -> None:
    base, study = make_base(), make_study()
    for model in study.models():
        config = model_config(base, model)
        assert config.model.position_method == model.method
        assert config.train.output_dir == f"runs/compare/{model.method}_{model.length}"
        for name in ("global_batch_size", "micro_batch_size", "eval_samples"):
            assert getattr(config.train, name) * config.data.seq_length == getattr(base.train, name) * 64
        assert (config.optimizer, config.train.steps) == (base.optimizer, base.train.steps)
    assert model_config(base, ComparedModel(method="alibi", length=64)).model == base.model


def test_scaled_tokens_are_of_the_sinusoidal_models_alone() -> None:
    scaled = make_config(
        "tokens", model={"position_method": "sinusoidal", "scale_embedding": True}, data={"seq_length": 64}
    )
    for model in make_study().models():
        assert model_config(scaled, model).model.scale_embedding == (model.method == "sinusoidal")


def test_each_pair_is_alibi_at_one_length_and_sinusoidal_at_the_next() -> None:
    pairs = [(short.name, long.name) for short, long in make_study().pairs()]
    assert pairs == [("alibi_16", "sinusoidal_32"), ("alibi_32", "sinusoidal_64")]


def test_variants_are_the_models_with_both_kinds_of_attention() -> None:
    base, study = make_base(), make_study(warm_steps=2, steps_per_turn=3)
    configs = {variant.name: variant_config(base, study, variant) for variant in variants(study)}
    assert len(configs) == 2 * 3 * 2
    assert {name.rsplit("_")[-1]: c.model.attention_backend for name, c in configs.items()} == {
        "unfused": "unfused",
        "fast": "auto",
    }
    assert all(config.train.steps == 5 for config in configs.values())
    assert len({config.train.output_dir for config in configs.values()}) == len(configs)


def test_unfused_attention_may_have_micro_batches_of_its_own() -> None:
    base = make_base()
    for study, tokens in ((make_study(), 2 * 64), (make_study(unfused_micro_batch_size=1), 64)):
        for variant in variants(study):
            config = variant_config(base, study, variant)
            micro_batch_tokens = config.train.micro_batch_size * config.data.seq_length
            assert micro_batch_tokens == (tokens if variant.attention == "unfused" else 2 * 64)
            assert config.train.global_batch_size * config.data.seq_length == 8 * 64


def test_length_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train.global_batch_size=8: times data.seq_length=64 it must be a multiple of the 24"
    ):
        model_config(make_base(), ComparedModel(method="alibi", length=24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (16,)}, "must be two or more rising lengths above 0"),
        ({"lengths": (32, 16)}, "must be two or more rising lengths above 0"),
        ({"lengths": (16, 16)}, "must be two or more rising lengths above 0"),
        ({"lengths": (0, 16)}, "must be two or more rising lengths above 0"),
        ({"turns": 0}, "study.turns=0: must be at least 1"),
        ({"warm_steps": 0}, "study.warm_steps=0: must be at least 1"),
        ({"ranks": 0}, "study.ranks=0: must be at least 1"),
        ({"unfused_micro_batch_size": -1}, "study.unfused_micro_batch_size=-1: must be 0 or more"),
        ({"valid_tokens": 256}, "study.valid_tokens=256: must be more than 256"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(**changes)


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_of_a_scale_can_run_on_its_ranks(scale: str) -> None:
    study, base = load_study(CONFIGS / f"compare_{scale}.yaml", [], CompareStudy)
    tokens = {derive(model_config(base, model), study.ranks).batch_tokens for model in study.models()}
    assert len(tokens) == 1
    assert (base.checkpoint.keep, len(study.lengths)) == (0, 3)


def test_large_scale_and_small_scale_have_the_papers_lengths() -> None:
    for scale in ("small", "1.3b", "1.3b_10min"):
        study, _ = load_study(CONFIGS / f"compare_{scale}.yaml", [], CompareStudy)
        assert study.lengths == (512, 1024, 2048)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalibi.config import ModelConfig, config_from_dict, config_to_dict, load_config, save_config
from megalibi.errors import ConfigError

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 301,
}  # fmt: skip
LEARNED = {"position_method": "learned", "max_position_embeddings": 8}
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_alibi": True, "position_method": "rotary"},
         "model.scale_alibi=True: must be false with model.position_method=rotary"),
        ({"scale_embedding": True},
         "model.scale_embedding=True: must be false with model.position_method=alibi"),
        ({"scale_embedding": True, "position_method": "sinusoidal", "adaptive_cutoffs": (100,)},
         "model.scale_embedding=True: must be false with model.adaptive_cutoffs, whose embedding is multiplied by "
         "sqrt(hidden_size) already"),
        ({"embedding_norm": True, "position_method": "sinusoidal"},
         "model.embedding_norm=True: must be false with model.position_method=sinusoidal, which adds positions to the "
         "embedding"),
        ({"embedding_norm": True, **LEARNED},
         "model.embedding_norm=True: must be false with model.position_method=learned, which adds positions to the "
         "embedding"),
        ({"activation": "gelu_new"}, "model.activation=gelu_new: must be one of gelu, gelu_tanh, relu"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**SHAPE, **fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("method", ["alibi", "rotary", "t5_bias", "none"])
def test_an_embedding_norm_goes_with_methods_that_leave_the_embedding_alone(method: str) -> None:
    assert ModelConfig(**SHAPE, position_method=method, embedding_norm=True).embedding_norm


@pytest.mark.parametrize("bias", [False, True])
def test_norms_have_biases_as_linear_layers_do_unless_they_are_told_otherwise(bias: bool) -> None:
    assert ModelConfig(**SHAPE, bias=bias).has_norm_bias == bias
    for norm_bias in (False, True):
        assert ModelConfig(**SHAPE, bias=bias, norm_bias=norm_bias).has_norm_bias == norm_bias


def test_the_options_are_off_by_default_and_saved_as_given(tmp_path: Path) -> None:
    plain = load_config(QUICKSTART)
    tree = config_to_dict(plain)
    assert [tree["model"].pop(option) for option in ("embedding_norm", "scale_alibi", "norm_bias")] == [
        False,
        False,
        None,
    ]
    assert config_from_dict(tree) == plain  # as the manifest of an older checkpoint has it
    overrides = ["embedding_norm=true", "scale_alibi=true", "norm_bias=false", "bias=true", "activation=gelu_tanh"]
    config = load_config(QUICKSTART, [f"model.{override}" for override in overrides])
    assert (config.model.norm_bias, config.model.activation) == (False, "gelu_tanh")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config

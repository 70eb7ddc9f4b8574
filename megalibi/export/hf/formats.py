"""The three architectures of transformers that have ALiBi, as data: names, needs, and the fields of config.json.

Everything here is of transformers' own classes (models/mpt, models/bloom and models/falcon of release 5.24).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.errors import ConfigError
from megalibi.export.hf.qkv import interleave_heads, separate_heads

_BLOCK = "blocks"
_MAX_SPELLED = 60
_FUSED = "attention.qkv"
MAX_LENGTH = 1 << 24
"""The most tokens of a text that a config.json may allow: MPT's class makes a bias of that length."""
SEQ_LENGTH_FIELD = "megalibi_seq_length"
"""A field of config.json that transformers leaves alone: the length of the samples that the model was trained on."""


@dataclass(frozen=True)
class Need:
    """What a format can hold of a field of the model."""

    field: str
    """The field of ModelConfig that is meant."""
    get_value: Callable[[ModelConfig], Any]
    """Returns what the model has there."""
    get_allowed: Callable[[ModelConfig], Any]
    """Returns what the format can hold."""
    reason: str
    """Why it can hold nothing else."""


@dataclass(frozen=True, kw_only=True)
class HfFormat:
    """How a model of ours is one of transformers' architecture."""

    name: str
    """The ``model_type``: mpt, bloom or falcon."""
    architecture: str
    """The class that transformers has for it."""
    outside: Mapping[str, str]
    """Our modules outside of the blocks, by name, with the names that they have there."""
    blocks: str
    """The name of the list of blocks there."""
    inside: Mapping[str, str]
    """Our modules of a block, by name, with the names that they have there."""
    interleaves: bool
    """Whether q, k and v of a head stand together in the fused layer."""
    needs: tuple[Need, ...]
    """What the model must be."""
    rounds_bias: bool = False
    """Whether the class rounds slopes and distances to bfloat16, whatever the type of the weights."""
    write_fields: Callable[[ModelConfig, int], dict[str, Any]]
    """Returns the fields of config.json that say the architecture, for a model and the most tokens it shall see."""

    def find_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield a line for each thing that a model has and the format cannot hold."""
        for need in self.needs:
            value, allowed = need.get_value(model), need.get_allowed(model)
            if value != allowed:
                shown = f"model.{need.field}={_spell(value)}: must be {_spell(allowed)} for --format {self.name}"
                yield f"{shown}: {need.reason}"

    def rename(self, name: str) -> str:
        """Return the name that a parameter of ours has there.

        Args:
            name: Such as ``blocks.0.attention.qkv.weight``.
        """
        module, _, kind = name.rpartition(".")
        if module.startswith(f"{_BLOCK}."):
            _, number, part = module.split(".", 2)
            return f"{self.blocks}.{number}.{self.inside[part]}.{kind}"
        return f"{self.outside[module]}.{kind}"

    def to_theirs(self, name: str, values: Tensor, num_heads: int) -> Tensor:
        """Return a parameter in the order of the format.

        Args:
            name: Our name of it.
            values: The parameter, whole.
            num_heads: The number of heads of the model.
        """
        return interleave_heads(values, num_heads) if self._is_reordered(name) else values

    def to_ours(self, name: str, values: Tensor, num_heads: int) -> Tensor:
        """Return a parameter in our order: the inverse of ``to_theirs``, with the same arguments."""
        return separate_heads(values, num_heads) if self._is_reordered(name) else values

    def _is_reordered(self, name: str) -> bool:
        return self.interleaves and f".{_FUSED}." in name


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def _is(field: str, allowed: Any, reason: str) -> Need:
    attribute = "has_norm_bias" if field == "norm_bias" else field
    return Need(field, lambda model: getattr(model, attribute), lambda model: allowed, reason)


_FOUR_TIMES = Need(
    "ffn_hidden_size",
    lambda model: model.ffn_hidden_size,
    lambda model: 4 * model.hidden_size,
    "its class has feed-forward layers of 4 x hidden_size",
)
_OF_ALL = (
    _is("position_method", "alibi", "its class has ALiBi alone"),
    _is("adaptive_cutoffs", (), "its class has one table for the whole vocabulary"),
    _is("final_norm", True, "its class has a layer norm before the output layer"),
)
_PAPER_SLOPES = _is("scale_alibi", False, "its class scales q.k alone, as the paper does")


def _mpt_fields(model: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "d_model": model.hidden_size,
        "n_heads": model.num_attention_heads,
        "n_layers": model.num_layers,
        "expansion_ratio": 4,
        "max_seq_len": max_length,
        "learned_pos_emb": False,
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention"},
    }


def _bloom_fields(model: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_layer": model.num_layers,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


FALCON_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""The name that transformers has for each activation of ours."""


def _falcon_fields(model: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "ffn_hidden_size": model.ffn_hidden_size,
        "activation": FALCON_ACTIVATIONS[model.activation],
        "bias": model.bias,
        "alibi": True,
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "max_position_embeddings": max_length,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


MPT = HfFormat(
    name="mpt",
    architecture="MptForCausalLM",
    outside={"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "output": "lm_head"},
    blocks="transformer.blocks",
    inside={
        "attention_norm": "norm_1",
        "attention.qkv": "attn.Wqkv",
        "attention.proj": "attn.out_proj",
        "mlp_norm": "norm_2",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    },
    interleaves=False,
    needs=(
        *_OF_ALL,
        _PAPER_SLOPES,
        _FOUR_TIMES,
        _is("activation", "gelu", "its class has the exact GELU alone"),
        _is("bias", False, "its class has no biases"),
        _is("norm_bias", False, "its class has layer norms without biases"),
        _is("embedding_norm", False, "its class has no layer norm behind the embedding"),
    ),
    write_fields=_mpt_fields,
)
_BLOOM_INSIDE = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attention.query_key_value",
    "attention.proj": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_BLOOM_OUTSIDE = {
    "embedding": "transformer.word_embeddings",
    "final_norm": "transformer.ln_f",
    "output": "lm_head",
}
BLOOM = HfFormat(
    name="bloom",
    architecture="BloomForCausalLM",
    outside={**_BLOOM_OUTSIDE, "embedding_norm": "transformer.word_embeddings_layernorm"},
    blocks="transformer.h",
    inside=_BLOOM_INSIDE,
    interleaves=True,
    needs=(
        *_OF_ALL,
        _PAPER_SLOPES,
        _FOUR_TIMES,
        _is("activation", "gelu_tanh", "its class has the GELU by tanh alone"),
        _is("bias", True, "its linear layers have biases"),
        _is("norm_bias", True, "its layer norms have biases"),
        _is("embedding_norm", True, "its class has a layer norm behind the embedding"),
    ),
    write_fields=_bloom_fields,
)
FALCON = HfFormat(
    name="falcon",
    architecture="FalconForCausalLM",
    outside=_BLOOM_OUTSIDE,
    blocks="transformer.h",
    inside=_BLOOM_INSIDE,
    interleaves=True,
    needs=(
        *_OF_ALL,
        _is("scale_alibi", True, "its class scales q.k and the bias together, by 1/sqrt(head dimension)"),
        _is("norm_bias", True, "its layer norms have biases"),
        _is("embedding_norm", False, "its class has no layer norm behind the embedding"),
    ),
    rounds_bias=True,
    write_fields=_falcon_fields,
)
FORMATS: Mapping[str, HfFormat] = {known.name: known for known in (MPT, BLOOM, FALCON)}
"""Every format by its name."""


def spell_json(value: Any) -> str:
    """Return a value as config.json has it, and of a long one the beginning."""
    text = json.dumps(value)
    return text if len(text) <= _MAX_SPELLED else f"{text[:_MAX_SPELLED]}..."


def get_format(model_type: object) -> HfFormat:
    """Return a format by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise ConfigError(f"model_type={spell_json(model_type)}: must be one of {', '.join(FORMATS)}, which have ALiBi")
    return FORMATS[model_type]

"""From the config.json of a folder of Hugging Face to a model of ours; what ours would compute otherwise is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megalibi.config import ModelConfig
from megalibi.errors import ConfigError
from megalibi.export.hf.formats import FALCON_ACTIVATIONS, SEQ_LENGTH_FIELD, HfFormat, get_format

_DEFAULT_SEQ_LENGTH = 2048
_T = TypeVar("_T")


@dataclass(frozen=True)
class ForeignModel:
    """What a config.json says."""

    known: HfFormat
    """The architecture that the file names."""
    model: ModelConfig
    """The same model as one of ours."""
    seq_length: int
    """The number of tokens of a training sample, as far as the folder says it."""


def read_hf_config(fields: Mapping[str, Any], where: str) -> ForeignModel:
    """Return the model that a config.json describes.

    Args:
        fields: Its fields.
        where: The file, which errors name.

    Raises:
        ConfigError: A field is missing or of another type, or stands for what a model of ours does not compute.
    """
    try:
        return _read(fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _read(fields: Mapping[str, Any]) -> ForeignModel:
    known = get_format(fields.get("model_type"))
    architectures = fields.get("architectures") or [known.architecture]
    bare = known.architecture.replace("ForCausalLM", "Model")
    if architectures not in ([known.architecture], [bare]):
        raise ConfigError(f"architectures={architectures}: must be [{known.architecture}]")
    for name in ("attn_implementation", "_attn_implementation"):
        if fields.get(name) not in (None, "eager", "sdpa"):
            raise ConfigError(f"{name}={fields[name]!r}: must be eager or sdpa; nothing else is run")
    if fields.get("quantization_config") is not None:
        raise ConfigError("quantization_config: must not be there; weights are read as they are")
    readers = {"mpt": _read_mpt, "bloom": _read_bloom, "falcon": _read_falcon}
    model = ModelConfig(
        vocab_size=_get(fields, "vocab_size", int),
        tie_embeddings=_get(fields, "tie_word_embeddings", bool, True),
        layer_norm_epsilon=float(_get(fields, "layer_norm_epsilon", (float, int), 1e-5)),
        **readers[known.name](fields),
    )
    for refusal in known.find_refusals(model):  # what the readers above made cannot be told from a mistake of theirs
        raise ConfigError(refusal)
    lengths = (SEQ_LENGTH_FIELD, "max_seq_len", "seq_length", "max_position_embeddings")
    seq_length = next((fields[name] for name in lengths if fields.get(name)), _DEFAULT_SEQ_LENGTH)
    if type(seq_length) is not int or seq_length < 1:
        raise ConfigError(f"{SEQ_LENGTH_FIELD}={seq_length!r}: must be a number of tokens")
    return ForeignModel(known, model, seq_length)


def _read_mpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = _get(fields, ("d_model", "hidden_size"), int), _get(fields, ("n_heads", "num_attention_heads"), int)
    attention = fields.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise ConfigError("attn_config: must be an object")
    _check(attention, "alibi", True, True, "our model has ALiBi alone to read it into")
    _check(attention, "alibi_bias_max", 8, 8, "the slopes of ALiBi end at 2^-8")
    _check(attention, "attn_type", "multihead_attention", "multihead_attention", "each head has keys of its own")
    for name in ("qk_ln", "prefix_lm", "attn_uses_sequence_id"):
        _check(attention, name, False, False, "our attention has no such step")
    _check(attention, "clip_qkv", None, None, "our attention clips nothing")
    scale = attention.get("softmax_scale")
    if scale is not None and not (isinstance(scale, float) and heads and math.isclose(scale, (hidden / heads) ** -0.5)):
        raise ConfigError(f"softmax_scale={scale!r}: must be null, or 1/sqrt(head dimension)")
    _check(fields, "logit_scale", None, None, "our output layer scales nothing")
    _check(fields, "no_bias", True, True, "its class has no biases")
    _check(fields, "expansion_ratio", 4, 4, "its class has feed-forward layers of 4 x hidden size")
    layers = _get(fields, ("n_layers", "num_hidden_layers"), int)
    return _sizes(hidden, heads, layers, 4 * hidden) | {"activation": "gelu", "bias": False}


def _read_bloom(fields: Mapping[str, Any]) -> dict[str, Any]:
    _check(fields, "apply_residual_connection_post_layernorm", False, False, "our residual stream has no norm in it")
    hidden = _get(fields, ("n_embed", "hidden_size"), int)
    heads = _get(fields, ("n_head", "num_attention_heads"), int)
    layers = _get(fields, ("n_layer", "num_hidden_layers"), int)
    return _sizes(hidden, heads, layers, 4 * hidden) | {
        "activation": "gelu_tanh",
        "bias": True,
        "embedding_norm": True,
    }


def _read_falcon(fields: Mapping[str, Any]) -> dict[str, Any]:
    _check(fields, "alibi", False, True, "our model has ALiBi alone to read it into")
    _check(fields, "new_decoder_architecture", False, False, "our blocks are those of Falcon-RW")
    _check(fields, "multi_query", True, False, "each head has keys of its own")
    _check(fields, "parallel_attn", True, False, "attention comes before the feed-forward layer")
    hidden = _get(fields, ("n_embed", "hidden_size"), int)
    heads = _get(fields, ("n_head", "num_attention_heads"), int)
    layers = _get(fields, ("n_layer", "num_hidden_layers"), int)
    if fields.get("num_kv_heads") not in (None, heads):
        raise ConfigError(f"num_kv_heads={fields['num_kv_heads']!r}: must be num_attention_heads={heads}")
    activations = {theirs: ours for ours, theirs in FALCON_ACTIVATIONS.items()}
    activation = _get(fields, "activation", str, "gelu")
    if activation not in activations:
        raise ConfigError(f"activation={activation!r}: must be one of {', '.join(activations)}")
    width = _get(fields, "ffn_hidden_size", int, 4 * hidden)
    return _sizes(hidden, heads, layers, width) | {
        "activation": activations[activation],
        "bias": _get(fields, "bias", bool, False),
        "norm_bias": True,
        "scale_alibi": True,
    }


def _sizes(hidden: int, heads: int, layers: int, width: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_layers": layers, "ffn_hidden_size": width}


def _get(
    fields: Mapping[str, Any], names: str | tuple[str, ...], kind: type[_T] | tuple[type, ...], default: Any = None
) -> Any:
    """Return a field of one of several names that is of a type; null is the default."""
    names = (names,) if isinstance(names, str) else names
    name = next((name for name in names if fields.get(name) is not None), names[-1])
    value = fields.get(name)
    value = default if value is None else value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise ConfigError(f"{name}={value!r}: must be {' or '.join(k.__name__ for k in kinds)}")
    return value


def _check(fields: Mapping[str, Any], name: str, default: Any, allowed: Any, reason: str) -> None:
    value = fields.get(name, default)
    if value != allowed or (isinstance(allowed, bool) and type(value) is not bool):
        raise ConfigError(f"{name}={value!r}: must be {allowed!r}: {reason}")

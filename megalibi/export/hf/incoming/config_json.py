"""From the config.json of a folder of Hugging Face to a model of ours; what ours would compute otherwise is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalibi.config import ModelConfig
from megalibi.errors import ConfigError
from megalibi.export.hf.formats import (
    FALCON_ACTIVATIONS,
    MAX_LENGTH,
    SEQ_LENGTH_FIELD,
    HfFormat,
    get_format,
    spell_json,
)

_DEFAULT_SEQ_LENGTH = 2048
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


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
    allowed = (known.architecture, known.architecture.replace("ForCausalLM", "Model"))  # with the output layer, or bare
    spelled = [str(name).lower() for name in architectures] if isinstance(architectures, list) else architectures
    if spelled not in [[name.lower()] for name in allowed]:  # MosaicML's folders have MPTForCausalLM
        raise ConfigError(f"architectures={spell_json(architectures)}: must be {spell_json([known.architecture])}")
    for name in ("attn_implementation", "_attn_implementation"):
        if fields.get(name) not in (None, "eager", "sdpa"):
            raise ConfigError(f"{name}={spell_json(fields[name])}: must be eager or sdpa; nothing else is run")
    if fields.get("quantization_config") is not None:
        raise ConfigError("quantization_config: must not be there; weights are read as they are")
    readers = {"mpt": _read_mpt, "bloom": _read_bloom, "falcon": _read_falcon}
    model = ModelConfig(
        vocab_size=_get_size(fields, "vocab_size"),
        tie_embeddings=_get(fields, "tie_word_embeddings", bool, True),
        layer_norm_epsilon=_get_epsilon(fields),
        **readers[known.name](fields),
    )
    for refusal in known.find_refusals(model):  # what the readers above made cannot be told from a mistake of theirs
        raise ConfigError(refusal)
    lengths = (SEQ_LENGTH_FIELD, "max_seq_len", "seq_length", "max_position_embeddings")
    said = [name for name in lengths if fields.get(name) is not None]
    seq_length = _get_size(fields, said[0]) if said else _DEFAULT_SEQ_LENGTH
    for name in said:
        if _get_size(fields, name) > MAX_LENGTH:
            raise ConfigError(f"{name}={spell_json(fields[name])}: must be at most {MAX_LENGTH}")
    return ForeignModel(known, model, seq_length)


def _read_mpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden = _get_size(fields, "d_model", "hidden_size")
    heads = _get_size(fields, "n_heads", "num_attention_heads")
    attention = fields.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise ConfigError("attn_config: must be an object")
    check = partial(_check, attention, within="attn_config.")
    check("alibi", True, True, "our model has ALiBi alone to read it into")
    check("alibi_bias_max", 8, 8, "the slopes of ALiBi end at 2^-8")
    check("attn_type", "multihead_attention", "multihead_attention", "each head has keys of its own")
    for name in ("qk_ln", "prefix_lm", "attn_uses_sequence_id"):
        check(name, False, False, "our attention has no such step")
    check("rope", False, False, "our positions are ALiBi alone")
    check("kv_n_heads", heads, heads, "each head has keys of its own")
    check("clip_qkv", None, None, "our attention clips nothing")
    scale = attention.get("softmax_scale")
    if scale is not None and not (isinstance(scale, float) and math.isclose(scale, (hidden / heads) ** -0.5)):
        raise ConfigError(f"attn_config.softmax_scale={spell_json(scale)}: must be null, or 1/sqrt(head dimension)")
    _check(fields, "logit_scale", None, None, "our output layer scales nothing")
    if fields.get("norm_type") not in (None, "low_precision_layernorm", "layernorm"):
        raise ConfigError(f"norm_type={spell_json(fields['norm_type'])}: must be layernorm: our norm is no other")
    _check(fields, "no_bias", True, True, "its class has no biases")
    _check(fields, "expansion_ratio", 4, 4, "its class has feed-forward layers of 4 x hidden size")
    layers = _get_size(fields, "n_layers", "num_hidden_layers")
    return _sizes(hidden, heads, layers, 4 * hidden) | {"activation": "gelu", "bias": False}


def _read_bloom(fields: Mapping[str, Any]) -> dict[str, Any]:
    _check(fields, "apply_residual_connection_post_layernorm", False, False, "our residual stream has no norm in it")
    hidden = _get_size(fields, "n_embed", "hidden_size")
    heads = _get_size(fields, "n_head", "num_attention_heads")
    layers = _get_size(fields, "n_layer", "num_hidden_layers")
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
    hidden = _get_size(fields, "n_embed", "hidden_size")
    heads, layers = _get_size(fields, "num_attention_heads"), _get_size(fields, "num_hidden_layers")
    if fields.get("num_kv_heads") not in (None, heads):
        raise ConfigError(f"num_kv_heads={spell_json(fields['num_kv_heads'])}: must be num_attention_heads={heads}")
    activations = {theirs: ours for ours, theirs in FALCON_ACTIVATIONS.items()}
    activation = _get(fields, "activation", str, "gelu")
    if activation not in activations:
        raise ConfigError(f"activation={spell_json(activation)}: must be one of {', '.join(activations)}")
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
    fields: Mapping[str, Any], names: str | tuple[str, ...], kind: type | tuple[type, ...], default: Any = None
) -> Any:
    """Return a field of one of several names that is of a type; null is the default."""
    names = (names,) if isinstance(names, str) else names
    said = [name for name in names if fields.get(name) is not None]
    if any(fields[name] != fields[said[0]] for name in said[1:]):  # of which transformers takes one
        values = ", ".join(f"{name}={spell_json(fields[name])}" for name in said)
        raise ConfigError(f"{values}: must be the same, for they are names of one thing")
    name = said[0] if said else names[-1]
    value = fields.get(name)
    value = default if value is None else value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise ConfigError(f"{name}={spell_json(value)}: must be {_KIND_NAMES[kinds[0]]}")
    return value


def _get_size(fields: Mapping[str, Any], *names: str) -> int:
    """Return a field of one of several names that is a number of things."""
    size: int = _get(fields, names, int)
    if size < 1:
        name = next(name for name in names if fields.get(name) is not None)
        raise ConfigError(f"{name}={size}: must be at least 1")
    return size


def _get_epsilon(fields: Mapping[str, Any]) -> float:
    value = _get(fields, "layer_norm_epsilon", (float, int), 1e-5)
    try:
        epsilon = float(value)
    except OverflowError:
        epsilon = math.inf
    if not math.isfinite(epsilon):
        raise ConfigError(f"layer_norm_epsilon={spell_json(value)}: must be a finite number")
    return epsilon


def _check(fields: Mapping[str, Any], name: str, default: Any, allowed: Any, reason: str, *, within: str = "") -> None:
    """Check that a field, of an object within config.json or of its own, has the one value that is ours."""
    value = fields.get(name, default)
    if value != allowed or (isinstance(allowed, bool) and type(value) is not bool):
        raise ConfigError(f"{within}{name}={spell_json(value)}: must be {spell_json(allowed)}: {reason}")

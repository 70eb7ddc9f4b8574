"""The two architectures of llama.cpp that have ALiBi and can hold a model of ours, and the names of its tensors there.

Everything here is of llama.cpp's own code (src/models/mpt.cpp and src/models/bloom.cpp). Both compute the GELU by tanh,
from a table of half precision, whatever the model was trained with; q, k and v stand one after the other, as ours do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megalibi.config import ModelConfig

MAX_ALIBI_BIAS = 8.0
"""The exponent of the last head's slope, 2^-8, where their number is a power of two."""
_OUTSIDE = {
    "embedding": "token_embd",
    "embedding_norm": "token_embd_norm",
    "final_norm": "output_norm",
    "output": "output",
}
_INSIDE = {
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def choose_architecture(model: ModelConfig) -> str:
    """Return the name of the architecture: bloom has a norm behind the embedding, and mpt has none."""
    return "bloom" if model.embedding_norm else "mpt"


def find_gguf_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield a line for each thing that a model has and llama.cpp cannot compute."""
    needs = [
        ("position_method", model.position_method, "alibi", "other positions are of other architectures"),
        ("adaptive_cutoffs", list(model.adaptive_cutoffs), [], "llama.cpp has one table for the whole vocabulary"),
        ("final_norm", model.final_norm, True, "llama.cpp has a layer norm before the output layer"),
        ("scale_alibi", model.scale_alibi, False, "llama.cpp adds the bias as the paper does"),
    ]
    if choose_architecture(model) == "bloom":
        reason = "the architecture with an embedding norm, bloom, has biases everywhere"
        needs += [("bias", model.bias, True, reason), ("norm_bias", model.has_norm_bias, True, reason)]
    for field, value, allowed, reason in needs:
        if value != allowed:
            yield f"model.{field}={_spell(value)}: must be {_spell(allowed)} for a GGUF file: {reason}"
    if model.activation not in ("gelu", "gelu_tanh"):
        yield f"model.activation={model.activation}: must be gelu or gelu_tanh for a GGUF file: llama.cpp has a GELU"


def rename_for_gguf(name: str) -> str:
    """Return the name that a parameter of ours has in the file.

    Args:
        name: Such as ``blocks.0.attention.qkv.weight``.
    """
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, number, part = module.split(".", 2)
        return f"blk.{number}.{_INSIDE[part]}.{kind}"
    return f"{_OUTSIDE[module]}.{kind}"


def compute_llama_slopes(num_heads: int, max_bias: float = MAX_ALIBI_BIAS) -> Tensor:
    """Return the slopes as ggml_soft_max_ext computes them, fp32 [heads] (ggml/src/ggml-cpu/ops.cpp).

    It is written here after llama.cpp's formula, for its library does not offer them: the logits alone can show that
    it does as it says. Powers of bases that fp32 has rounded differ from the paper's slopes by up to 7e-7 of a slope,
    with 128 heads.

    Args:
        num_heads: The number of heads.
        max_bias: The exponent that the file says.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    two = np.float32(2.0)
    base, others_base = (np.power(two, np.float32(-bias / power)) for bias in (max_bias, max_bias / 2))
    first_H = np.power(base, np.arange(1, power + 1, dtype=np.float32))
    others_H = np.power(others_base, np.arange(1, 2 * (num_heads - power), 2, dtype=np.float32))
    return torch.from_numpy(np.concatenate([first_H, others_H]))


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

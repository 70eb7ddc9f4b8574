"""Tiny models with random weights, as checkpoints that can be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.config import Config
from megalibi.export.compose import compose_checkpoint, describe_whole_model
from megalibi.export.hf.formats import FORMATS
from megalibi.export.hf.plan import HfPlan, plan_hf
from megalibi.export.portable_tokenizer import find_tokenizer
from tests.support.runs import VOCAB_SIZE, make_config

SEQ_LENGTH = 33
MODELS: dict[str, dict[str, Any]] = {
    "mpt": {},
    "bloom": {"bias": True, "embedding_norm": True, "activation": "gelu_tanh"},
    "falcon": {"bias": True, "scale_alibi": True},
}
"""What a model of each format needs beside the default."""
SIZES = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 192, "vocab_size": VOCAB_SIZE}


def configure_model(kind: str, *, heads: int = 4, tensor: int = 1, **model: Any) -> Config:
    fields = {**SIZES, "num_attention_heads": heads, **MODELS[kind], **model}
    return make_config("none", model=fields, parallel={"tensor_parallel_size": tensor})


def draw_weights(config: Config) -> dict[str, Tensor]:
    """Return weights so large that attention and biases matter to the logits."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, entry in describe_whole_model(config)[0].items():
        weights[name] = 0.3 * torch.randn(entry.shape, generator=generator) + (1.0 if "norm.weight" in name else 0.0)
    return weights


def write_random(folder: Path, config: Config) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Write a checkpoint with random weights; return both."""
    weights = draw_weights(config)
    folder.mkdir()
    compose_checkpoint(folder, config, weights.__getitem__)
    return Checkpoint.open(folder), weights


def plan(
    checkpoint: Checkpoint, kind: str, *, dtype: str = "float32", accept: bool = False, compare: bool = True
) -> HfPlan:
    found = find_tokenizer(checkpoint, None)
    return plan_hf(checkpoint, FORMATS[kind], found, dtype=dtype, accept_rounded_bias=accept, compare=compare)


def has_weights(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> bool:
    """Return whether a checkpoint has these weights, bit for bit, and an optimizer that has done nothing."""
    state = checkpoint.read_state()
    equal = all(torch.equal(state.read_whole(name), values) for name, values in weights.items())
    return equal and not any(state.read_whole(name, "exp_avg").any() for name in weights)

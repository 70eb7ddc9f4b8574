"""Whether the class of Falcon computes a model's bias exactly: it forms the bias in bfloat16, whatever the weights are.

``build_alibi_tensor`` multiplies slopes and positions in bfloat16, which has 8 bits: whole numbers are exact up to 256,
and slopes that are no powers of two are not exact at all. So heads must be 1, 2, 4 or 8, and no position past 256.
"""

from __future__ import annotations

import dataclasses

import torch

from megalibi.config import ModelConfig
from megalibi.export.hf.formats import HfFormat
from megalibi.model import model_slopes


def find_bias_error(model: ModelConfig, tokens: int) -> float:
    """Return the largest error of a bias for texts of so many tokens, in units of the bias before it is scaled.

    Args:
        model: The model.
        tokens: The number of tokens that it sees at once.
    """
    slopes_H = model_slopes(dataclasses.replace(model, scale_alibi=False))  # the class scales what it has rounded
    positions = torch.arange(tokens)
    exact = slopes_H.double()[:, None] * positions
    rounded = slopes_H.bfloat16()[:, None] * positions
    return float((rounded.double() - exact).abs().max())


def describe_rounding(known: HfFormat, model: ModelConfig, seq_length: int) -> str | None:
    """Return what a class rounds, in a sentence for certificate, model card and errors; None: it computes what we do.

    Args:
        known: The architecture.
        model: The model.
        seq_length: The training length, in tokens.
    """
    tokens = 2 * seq_length
    if not known.rounds_bias or not (error := find_bias_error(model, tokens)):
        return None
    return (
        f"transformers' Falcon computes the bias of ALiBi in bfloat16, which at {tokens:,} tokens (twice the training "
        f"length) and {model.num_attention_heads} heads is off by up to {error:.3g} before it is scaled"
    )

"""Attention with linear biases (arXiv:2108.12409): scores fall linearly with distance, each head with its own slope."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alibi_attention import alibi_slopes
from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod, ScoreBias
from megalibi.parallel import Group


class Alibi(PositionMethod):
    """The slopes of this rank's heads.

    They are keyed by global head id: every rank computes those of the whole model and takes its slice. They are no
    state: no buffer, so that no checkpoint holds them and ``.bfloat16()`` cannot round them. Nor is their scale, which
    is 1 unless an evaluation sets it.
    """

    bias = "alibi"

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.model = model
        self.num_heads_local = model.num_attention_heads // group.size
        self.first_head = group.rank * self.num_heads_local
        self._slopes: Tensor | None = None
        self._scale = 1.0

    def scale_slopes(self, factor: float) -> None:
        """Multiply the slopes of training by this from now on, in place of what they were multiplied by before."""
        self._scale, self._slopes = factor, None

    def score_bias(self, seq_length: int, device: torch.device) -> ScoreBias:
        """Return the slopes, fp32 [A]; computed at the first call."""
        # Not in __init__: for ZeRO 3 the model is built under zero.Init, which rounds every tensor that is made there.
        if self._slopes is None or self._slopes.device != device:
            slopes_H = (self._scale * _exact_slopes(self.model)).float()
            self._slopes = slopes_H[self.first_head : self.first_head + self.num_heads_local].to(device)
        return ScoreBias(alibi_slopes=self._slopes)


def model_slopes(model: ModelConfig) -> Tensor:
    """Return the slope of every head of a whole model, fp32 [H heads]: what attention multiplies distances with."""
    return _exact_slopes(model).float()


def _exact_slopes(model: ModelConfig) -> Tensor:
    """Return the slopes in fp64 [H heads], so that what they are multiplied by is rounded with them, once."""
    slopes_H = alibi_slopes(model.num_attention_heads).double()
    return slopes_H / math.sqrt(model.head_dim) if model.scale_alibi else slopes_H

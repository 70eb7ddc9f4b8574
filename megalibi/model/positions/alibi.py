"""Attention with linear biases (arXiv:2108.12409): scores fall linearly with distance, each head with its own slope."""

from __future__ import annotations

import torch
from torch import Tensor

from alibi_attention import local_slopes
from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod, ScoreBias
from megalibi.parallel import Group


class Alibi(PositionMethod):
    """The slopes of this rank's heads.

    They are keyed by global head id: every rank computes those of the whole model and takes its slice. They are no
    state: no buffer, so that no checkpoint holds them and ``.bfloat16()`` cannot round them.
    """

    bias = "alibi"

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.num_attention_heads = model.num_attention_heads
        self.num_heads_local = model.num_attention_heads // group.size
        self.first_head = group.rank * self.num_heads_local
        self._slopes: Tensor | None = None

    def score_bias(self, seq_length: int, device: torch.device) -> ScoreBias:
        """Return the slopes, fp32 [A]; computed at the first call."""
        # Not in __init__: for ZeRO 3 the model is built under zero.Init, which rounds every tensor that is made there.
        if self._slopes is None or self._slopes.device != device:
            self._slopes = local_slopes(self.num_attention_heads, self.first_head, self.num_heads_local).to(device)
        return ScoreBias(alibi_slopes=self._slopes)

"""Sinusoidal position embeddings (arXiv:1706.03762, section 3.5) for any length: the paper's first baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod
from megalibi.parallel import Group


class Sinusoidal(PositionMethod):
    """Add sin and cos of the position at geometrically falling frequencies to the embedded tokens.

    The first half of the hidden dimensions are sines, the second half cosines, as in fairseq (the paper's code), with
    frequencies 10000^(-i / (hidden_size / 2 - 1)). The table is no state: it is computed for the length at hand.

    In fairseq and in the paper, token embeddings start with a standard deviation of 1. Ours start with ``init_std``
    unless they are adaptive, and the table is scaled to match. Without that scale it would be 50 times larger than the
    token embeddings, and the model would learn next to nothing for hundreds of steps.
    """

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.scale = 1.0 if model.adaptive_cutoffs else model.init_std

    def add_to_embedding(self, x_BSH: Tensor, *, first: int = 0) -> Tensor:
        """Add the table to every row."""
        table_SH = self.scale * sinusoidal_table(x_BSH.shape[1], x_BSH.shape[2], x_BSH.device, first=first)
        return x_BSH + table_SH.to(x_BSH.dtype)


def sinusoidal_table(seq_length: int, hidden_size: int, device: torch.device, *, first: int = 0) -> Tensor:
    """Return the embeddings of the positions ``first``, ``first + 1``, ..., fp32 [S, H]."""
    half = hidden_size // 2
    # fp64: at position 16,384 an angle would be off by 1e-3 in fp32.
    steps = torch.arange(half, device=device, dtype=torch.float64)
    frequencies = torch.exp(steps * -(math.log(10_000.0) / max(1, half - 1)))
    position_S = torch.arange(first, first + seq_length, device=device, dtype=torch.float64)
    angles_SF = position_S[:, None] * frequencies[None, :]
    return torch.cat([angles_SF.sin(), angles_SF.cos()], dim=1).float()

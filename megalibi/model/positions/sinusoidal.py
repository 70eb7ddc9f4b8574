"""Sinusoidal position embeddings (arXiv:1706.03762, section 3.5) for any length: the paper's first baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalibi.model.positions.base import PositionMethod


class Sinusoidal(PositionMethod):
    """Add sin and cos of the position at geometrically falling frequencies to the embedded tokens.

    The first half of the hidden dimensions are sines, the second half cosines, as in fairseq (the paper's code), with
    frequencies 10000^(-i / (hidden_size / 2 - 1)). The table is no state: it is computed for the length at hand.
    """

    def add_to_embedding(self, x_BSH: Tensor) -> Tensor:
        """Add the table to every row."""
        return x_BSH + sinusoidal_table(x_BSH.shape[1], x_BSH.shape[2], x_BSH.device).to(x_BSH.dtype)


def sinusoidal_table(seq_length: int, hidden_size: int, device: torch.device) -> Tensor:
    """Return the position embeddings, fp32 [S, H]."""
    half = hidden_size // 2
    frequencies = torch.exp(torch.arange(half, device=device) * -(math.log(10_000.0) / max(1, half - 1)))
    angles_SF = torch.arange(seq_length, device=device)[:, None] * frequencies[None, :]
    return torch.cat([angles_SF.sin(), angles_SF.cos()], dim=1)

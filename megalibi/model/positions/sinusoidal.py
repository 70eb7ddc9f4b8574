"""Sinusoidal position embeddings (arXiv:1706.03762, section 3.5) for any length: the paper's first baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod, row_positions
from megalibi.parallel import Group


class Sinusoidal(PositionMethod):
    """Add sin and cos of the position at geometrically falling frequencies to the embedded tokens.

    The first half of the hidden dimensions are sines, the second half cosines, as in fairseq (the paper's code), with
    frequencies 10000^(-i / (hidden_size / 2 - 1)). The table is no state: it is computed for the length at hand.

    In fairseq and in the paper the embedded tokens are multiplied by sqrt(H), and the table has amplitude 1: that is
    ``model.scale_embedding``, and an adaptive embedding does it itself. Otherwise the table is scaled to the standard
    deviation ``init_std`` of the tokens: beside a table 50 times larger than they are, the model would learn next to
    nothing for hundreds of steps. ``model.sinusoidal_amplitude`` says another amplitude.
    """

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.amplitude = model.sinusoidal_table_amplitude
        self.token_scale = math.sqrt(model.hidden_size) if model.scale_embedding else 1.0

    def add_to_embedding(self, x_BSH: Tensor, *, first: Sequence[int] = (0,)) -> Tensor:
        """Add the table to every row."""
        position_BS = row_positions(first, x_BSH.shape[1], x_BSH.device)
        table_BSH = self.amplitude * sinusoidal_table(position_BS, x_BSH.shape[2])
        return torch.add(table_BSH.to(x_BSH.dtype), x_BSH, alpha=self.token_scale)


def sinusoidal_table(position: Tensor, hidden_size: int) -> Tensor:
    """Return the embedding of each position, fp32, in one dimension more: H."""
    half = hidden_size // 2
    # fp64: at position 16,384 an angle would be off by 1e-3 in fp32.
    steps = torch.arange(half, device=position.device, dtype=torch.float64)
    frequencies = torch.exp(steps * -(math.log(10_000.0) / max(1, half - 1)))
    angles = position.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

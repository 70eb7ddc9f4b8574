"""Rotary position embeddings (arXiv:2104.09864): queries and keys are turned by their position, in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod
from megalibi.parallel import Group

BASE = 10_000.0


class Rotary(PositionMethod):
    """Turn pair i of the head dimension by position x 10000^(-2i / K), in fp32.

    A pair is (i, i + K/2), as in GPT-NeoX and Llama: the same as the source's (2i, 2i + 1) but for the order of the
    learned dimensions. The table is no state: it is computed for the length at hand.
    """

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self._turns: tuple[Tensor, Tensor] | None = None
        self._first = 0

    def apply_to_query_key(self, q_BSAK: Tensor, k_BSAK: Tensor, *, first: int = 0) -> tuple[Tensor, Tensor]:
        """Turn both."""
        seq_length, head_dim = q_BSAK.shape[1], q_BSAK.shape[-1]
        turns = self._turns  # the same for every layer; not made in __init__, where zero.Init would round it
        if turns is None or (self._first, len(turns[0])) != (first, seq_length) or turns[0].device != q_BSAK.device:
            turns = self._turns = rotary_table(seq_length, head_dim, q_BSAK.device, first=first)
            self._first = first
        return _turn(q_BSAK, *turns), _turn(k_BSAK, *turns)


def rotary_table(seq_length: int, head_dim: int, device: torch.device, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles at ``first``, ``first + 1``, ..., fp32 [S, 1, K / 2] each."""
    # fp64: at position 16,384 an angle would be off by 1e-3 in fp32.
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    position_S = torch.arange(first, first + seq_length, device=device, dtype=torch.float64)
    angles = position_S[:, None] * BASE**-exponent
    return angles.cos().float().unsqueeze(1), angles.sin().float().unsqueeze(1)


def _turn(x_BSAK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSAK.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSAK.dtype)

"""Rotary position embeddings (arXiv:2104.09864): queries and keys are turned by their position, in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.model.positions.base import PositionMethod, row_positions
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
        self._first: Sequence[int] = ()

    def apply_to_query_key(
        self, q_BSAK: Tensor, k_BSAK: Tensor, *, first: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor]:
        """Turn both."""
        seq_length, head_dim = q_BSAK.shape[1], q_BSAK.shape[-1]
        turns = self._turns  # the same for every layer; not made in __init__, where zero.Init would round it
        if turns is None or (self._first, turns[0].shape[1]) != (first, seq_length) or turns[0].device != q_BSAK.device:
            turns = self._turns = rotary_table(row_positions(first, seq_length, q_BSAK.device), head_dim)
            self._first = first
        return _turn(q_BSAK, *turns), _turn(k_BSAK, *turns)


def rotary_table(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of each position, fp32, in two dimensions more each: 1, K / 2."""
    # fp64: at position 16,384 an angle would be off by 1e-3 in fp32.
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float64) / head_dim
    angles = position.double()[..., None, None] * BASE**-exponent
    return angles.cos().float(), angles.sin().float()


def _turn(x_BSAK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSAK.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSAK.dtype)

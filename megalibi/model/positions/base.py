"""The three places where a position method can act.

A new method is one file beside this one: a subclass that overrides the place where it acts, and a line in build.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.parallel import Group


class ScoreBias(NamedTuple):
    """What is added to the scores, for the heads of this rank: arguments of ``alibi_attention.attention``."""

    alibi_slopes: Tensor | None = None
    """Slopes of a linear bias, fp32 [A]."""
    distance_bias: Tensor | None = None
    """A bias by the distance between query and key, fp32 [A, D], D at least the length."""


class PositionMethod(nn.Module):
    """How the model knows order. The base class does nothing in all three places: that is the method ``none``.

    A method with parameters holds them in a module of its own and calls it where it uses them: ZeRO 3 makes parameters
    whole when the module that holds them is called.

    Shapes: B batch, S sequence, H hidden, A heads of this rank, K head dimension, D distances.

    Args:
        model: The network.
        group: The tensor group, which shares the heads.
    """

    bias = "no"
    """Which bias ``score_bias`` gives: "alibi" slopes, a "distance" bias or "no" bias; it decides the back end."""

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__()

    def add_to_embedding(self, x_BSH: Tensor, *, first: Sequence[int] = (0,)) -> Tensor:
        """Act on the embedded tokens; position 0 is the first token of the row, whatever documents begin in it.

        Args:
            x_BSH: The tokens at the positions ``first``, ``first + 1``, ...
            first: How many tokens of each row came before, in earlier calls; a single number stands for all rows.
        """
        return x_BSH

    def apply_to_query_key(
        self, q_BSAK: Tensor, k_BSAK: Tensor, *, first: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor]:
        """Act on the queries and keys at the positions ``first``, ``first + 1``, ... of each row, in every layer."""
        return q_BSAK, k_BSAK

    def score_bias(self, seq_length: int, device: torch.device) -> ScoreBias:
        """Return what is added to the scores of every layer: asked for once per forward pass.

        Args:
            seq_length: Number of keys that the last query sees, of the longest row.
            device: Where the scores are computed.
        """
        return ScoreBias()


def row_positions(first: Sequence[int], seq_length: int, device: torch.device) -> Tensor:
    """Return the positions of the tokens of each row, int64 [B, S]: those from its number in ``first`` on."""
    return torch.stack([torch.arange(start, start + seq_length, device=device) for start in first])

"""The three places where a position method can act.

A new method is one file beside this one: a subclass that overrides the place where it acts, and a line in build.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PositionMethod(nn.Module):
    """How the model knows order. The base class does nothing in all three places.

    Shapes: B batch, S sequence, H hidden, A heads of this rank, K head dimension.
    """

    def add_to_embedding(self, x_BSH: Tensor) -> Tensor:
        """Act on the embedded tokens; position 0 is the first token of the row."""
        return x_BSH

    def apply_to_query_key(self, q_BSAK: Tensor, k_BSAK: Tensor) -> tuple[Tensor, Tensor]:
        """Act on queries and keys, in every layer."""
        return q_BSAK, k_BSAK

    def score_slopes(self, device: torch.device) -> Tensor | None:
        """Return the slopes of a linear bias on the scores, fp32 [A], for the heads of this rank; None for no bias."""
        return None

"""Learned absolute position embeddings (as in GPT-2): a row for every position, and none past the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.errors import ConfigError
from megalibi.model.init import Normal, set_init
from megalibi.model.positions.base import PositionMethod, row_positions
from megalibi.parallel import Group


class Learned(PositionMethod):
    """Add the row of the position to the embedded token; ``model.max_position_embeddings`` is the number of rows."""

    def __init__(self, model: ModelConfig, group: Group) -> None:
        super().__init__(model, group)
        self.table = PositionTable(model)

    def add_to_embedding(self, x_BSH: Tensor, *, first: Sequence[int] = (0,)) -> Tensor:
        """Add the table to every row.

        Raises:
            ConfigError: The row is longer than the table.
        """
        return x_BSH + self.table(first, x_BSH.shape[1]).to(x_BSH.dtype)


class PositionTable(nn.Module):
    """The learned rows, [positions, H], whole on every rank of the tensor group. Weight decay spares them."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.max_position_embeddings, model.hidden_size))
        set_init(self.weight, Normal(model.init_std), may_decay=False)

    def forward(self, first: Sequence[int], seq_length: int) -> Tensor:
        """Return the rows from each number in ``first`` on, [B, S, H]."""
        length = max(first) + seq_length
        if length > len(self.weight):
            raise ConfigError(
                f"model.max_position_embeddings={len(self.weight)}: must be at least {length}, the length of the "
                "sequence, because model.position_method=learned has no embedding for a later position"
            )
        return F.embedding(row_positions(first, seq_length, self.weight.device), self.weight)

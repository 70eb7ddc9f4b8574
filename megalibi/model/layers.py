"""One block of the GPT: attention and feed-forward, each behind a layer norm and beside the residual stream.

Shapes: B batch, S sequence (this rank's part of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_attention import PackedDocuments
from fused_ops import add_layer_norm, can_fuse_layer_norm
from megalibi.config import ModelConfig
from megalibi.model.attention import SelfAttention
from megalibi.model.positions import PositionMethod, ScoreBias
from megalibi.parallel import (
    ColumnParallelLinear,
    Group,
    RowParallelLinear,
    dropout_key,
    keyed_dropout,
    use_replicated_param,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        model: The network.
        layer: Index of this block.
        positions: Shared by all blocks.
        group: The tensor group.
        sequence_parallel: Activations between the layers are cut along the sequence.
    """

    def __init__(
        self, model: ModelConfig, layer: int, positions: PositionMethod, *, group: Group, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.attention_norm = ResidualNorm(model, group=group, sequence_parallel=sequence_parallel)
        self.attention = SelfAttention(model, layer, positions, group=group, sequence_parallel=sequence_parallel)
        self.mlp_norm = ResidualNorm(model, group=group, sequence_parallel=sequence_parallel)
        self.mlp = MLP(model, layer, group=group, sequence_parallel=sequence_parallel)
        self.dropout = ResidualDropout(model.dropout, layer, group=group, sequence_parallel=sequence_parallel)

    def forward(
        self,
        x_BSH: Tensor,
        micro_batch_key: int | None,
        *bias: Tensor | None,
        documents: PackedDocuments | None = None,
    ) -> Tensor:
        """Return the residual stream after this block.

        Args:
            x_BSH: The residual stream.
            micro_batch_key: Keys dropout; None: no dropout.
            bias: The fields of a ScoreBias, one by one: activation checkpointing finds only tensors that are arguments
                themselves.
            documents: Attention does not cross their boundaries; None: it sees the whole row. By name, for ZeRO 3
                looks for tensors in what is given by position, and warns of a type that it does not know.
        """
        x_BSH, normed_BSH = self.attention_norm(x_BSH)
        y_BSH = self.attention(normed_BSH, micro_batch_key, ScoreBias(*bias), documents=documents)
        x_BSH, normed_BSH = self.mlp_norm(x_BSH, self.dropout(y_BSH, "attention output", micro_batch_key))
        y_BSH = self.mlp(normed_BSH, micro_batch_key)
        return x_BSH + self.dropout(y_BSH, "mlp output", micro_batch_key)


class MLP(nn.Module):
    """down(activation(up(x))): a column-parallel layer, then a row-parallel one, one reduction in all."""

    def __init__(self, model: ModelConfig, layer: int, *, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer = layer
        self.dropout_p = model.activation_dropout
        self.group = group
        hidden_size, ffn_hidden_size = model.hidden_size, model.ffn_hidden_size
        self.activation = _ACTIVATIONS[model.activation]
        self.up = ColumnParallelLinear(
            hidden_size, ffn_hidden_size, bias=model.bias, group=group, sequence_parallel=sequence_parallel
        )
        self.down = RowParallelLinear(
            ffn_hidden_size, hidden_size, bias=model.bias, group=group, sequence_parallel=sequence_parallel
        )

    def forward(self, x_BSH: Tensor, micro_batch_key: int | None = None) -> Tensor:
        """Return what the feed-forward layer adds to the residual stream, [B, S, H]."""
        y_BSF = self.activation(self.up(x_BSH))  # F columns of this rank
        if self.dropout_p > 0.0 and micro_batch_key is not None:
            # Inside the tensor-parallel region: each rank drops on its own columns.
            key = dropout_key(micro_batch_key, layer=self.layer, site="activation", shard_rank=self.group.rank)
            y_BSF = keyed_dropout(y_BSF, self.dropout_p, key)
        return self.down(y_BSF)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450), computed in the activation's dtype, with a bias only if the model has them."""

    def __init__(self, model: ModelConfig, *, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        self.epsilon = model.layer_norm_epsilon
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size)) if model.bias else None

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Return [B, S, H]."""
        return self.add_and_norm(x_BSH, None)[1]

    def add_and_norm(self, x_BSH: Tensor, y_BSH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + y, x itself without y, and the norm of it."""
        weight = self._used(self.weight, x_BSH)
        bias = None if self.bias is None else self._used(self.bias, x_BSH)
        if can_fuse_layer_norm(x_BSH):
            return add_layer_norm(x_BSH, y_BSH, weight, bias, self.epsilon)
        x_BSH = x_BSH if y_BSH is None else x_BSH + y_BSH
        return x_BSH, F.layer_norm(x_BSH, x_BSH.shape[-1:], weight, bias, self.epsilon)

    def _used(self, parameter: Tensor, x_BSH: Tensor) -> Tensor:
        if self.sequence_parallel:  # each rank sees a part of the tokens
            parameter = use_replicated_param(parameter, self.group)
        return parameter.to(x_BSH.dtype)


class ResidualNorm(LayerNorm):
    """The norm beside a residual stream, with the stream: fused, their two gradients meet without another pass."""

    def forward(self, x_BSH: Tensor, y_BSH: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the stream with y added, if there is one, and its norm; both [B, S, H]."""
        return self.add_and_norm(x_BSH, y_BSH)


class ResidualDropout:
    """Dropout outside the tensor-parallel regions: one mask for the whole tensor group, which holds the same numbers.

    Under sequence parallelism each rank holds other tokens, and drops on its own.

    Args:
        p: Probability of dropping.
        layer: Index of the block; -1 for the embedding.
        group: The tensor group.
        sequence_parallel: Activations are cut along the sequence.
    """

    def __init__(self, p: float, layer: int, *, group: Group, sequence_parallel: bool) -> None:
        self.p = p
        self.layer = layer
        self.shard_rank = group.rank if sequence_parallel else None

    def __call__(self, x_BSH: Tensor, site: str, micro_batch_key: int | None) -> Tensor:
        """Return x with elements dropped; x itself without a key."""
        if self.p == 0.0 or micro_batch_key is None:
            return x_BSH
        key = dropout_key(micro_batch_key, layer=self.layer, site=site, shard_rank=self.shard_rank)
        return keyed_dropout(x_BSH, self.p, key)

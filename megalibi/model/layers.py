"""The layers of a block beside attention: the feed-forward layer and the layer norms.

Shapes: B batch, S sequence (this rank's part of it under sequence parallelism), H hidden, F feed-forward columns of
this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops import add_layer_norm, can_fuse_layer_norm
from megalibi.config import ModelConfig
from megalibi.model.dropout import Site
from megalibi.model.init import Constant, residual_std, set_init, set_linear_init
from megalibi.parallel import (
    ColumnParallelLinear,
    Layout,
    RowParallelLinear,
    dropout_key,
    keyed_dropout,
    use_replicated_param,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(activation(up(x))): a column-parallel layer, then a row-parallel one, one reduction in all.

    Args:
        model: The network.
        layer: Index of the block this stands in.
        layout: How the ranks share the layers and the activations between them.
    """

    def __init__(self, model: ModelConfig, layer: int, *, layout: Layout) -> None:
        super().__init__()
        self.layer = layer
        self.shard_rank = layout.tensor.rank
        self.dropout_p = model.activation_dropout
        self.activation = _ACTIVATIONS[model.activation]
        self.up = ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, bias=model.bias, layout=layout)
        self.down = RowParallelLinear(model.ffn_hidden_size, model.hidden_size, bias=model.bias, layout=layout)
        set_linear_init(self.up, model.init_std)
        set_linear_init(self.down, residual_std(model))

    def forward(self, x_BSH: Tensor, micro_batch_key: int | None = None) -> Tensor:
        """Return what the feed-forward layer adds to the residual stream, [B, S, H]."""
        y_BSF = self.activation(self.up(x_BSH))
        if self.dropout_p > 0.0 and micro_batch_key is not None:
            # Inside the tensor-parallel region: each rank drops on its own columns.
            key = dropout_key(micro_batch_key, layer=self.layer, site=Site.ACTIVATION, shard_rank=self.shard_rank)
            y_BSF = keyed_dropout(y_BSF, self.dropout_p, key)
        return self.down(y_BSF)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450), computed in the activation's dtype, with a bias only if the model's norms have.

    Args:
        model: The network.
        layout: How the ranks share the activations.
    """

    def __init__(self, model: ModelConfig, *, layout: Layout) -> None:
        super().__init__()
        self.epsilon = model.layer_norm_epsilon
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        set_init(self.weight, Constant(1.0))
        self.bias: nn.Parameter | None = None
        if model.has_norm_bias:
            self.bias = nn.Parameter(torch.empty(model.hidden_size))
            set_init(self.bias, Constant(0.0))

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Return the norm of x, [B, S, H]."""
        return self.add_and_norm(x_BSH, None)[1]

    def add_and_norm(self, x_BSH: Tensor, y_BSH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + y, or x itself without y, and the norm of that."""
        weight = self._used(self.weight, x_BSH)
        bias = None if self.bias is None else self._used(self.bias, x_BSH)
        if can_fuse_layer_norm(x_BSH):
            return add_layer_norm(x_BSH, y_BSH, weight, bias, self.epsilon)
        x_BSH = x_BSH if y_BSH is None else x_BSH + y_BSH
        return x_BSH, F.layer_norm(x_BSH, x_BSH.shape[-1:], weight, bias, self.epsilon)

    def _used(self, parameter: Tensor, x_BSH: Tensor) -> Tensor:
        if self.layout.sequence_parallel:  # each rank sees a part of the tokens
            parameter = use_replicated_param(parameter, self.layout.tensor)
        return parameter.to(x_BSH.dtype)


class ResidualNorm(LayerNorm):
    """A layer norm that also adds to the residual stream: fused, the two gradients of the sum meet in the same pass."""

    def forward(self, x_BSH: Tensor, y_BSH: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the residual stream with y added, if there is one, and its norm; both [B, S, H]."""
        return self.add_and_norm(x_BSH, y_BSH)

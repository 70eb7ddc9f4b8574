"""Self-attention, cut by heads over the tensor group.

Shapes: B batch, S sequence, H hidden, A heads of this rank, K head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from alibi_attention import PackedDocuments, attention, resolve_backend, split_qkv
from megalibi.config import ModelConfig
from megalibi.errors import ConfigError
from megalibi.model.cache import LayerCache, attend_rows
from megalibi.model.dropout import Site
from megalibi.model.init import residual_std, set_linear_init
from megalibi.model.positions import METHODS, PositionMethod, ScoreBias
from megalibi.parallel import ColumnParallelLinear, Layout, RowParallelLinear, dropout_key, fork_rng


def check_backend(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Find out before the model is built whether its attention back end can run.

    Raises:
        ConfigError: It cannot, and why.
    """
    head_dim, dropout = model.head_dim, model.attention_dropout_probability > 0.0
    try:
        bias = METHODS[model.position_method].bias
        resolve_backend(model.attention_backend, device, dtype, head_dim, dropout=dropout, bias=bias)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"model.attention_backend={model.attention_backend} cannot be used: {error}") from error


class SelfAttention(nn.Module):
    """Causal self-attention; each rank of the tensor group holds ``num_attention_heads / tensor_parallel_size`` heads.

    Args:
        model: The network.
        layer: Index of the block this stands in.
        positions: Acts on q and k.
        layout: How the ranks share the heads, and the activations outside.
    """

    def __init__(self, model: ModelConfig, layer: int, positions: PositionMethod, *, layout: Layout) -> None:
        super().__init__()
        self.layer = layer
        self.shard_rank = layout.tensor.rank
        self.num_heads_local = model.num_attention_heads // layout.tensor.size
        self.dropout_p = model.attention_dropout_probability
        self.backend = model.attention_backend
        # The method alone: as a module of each layer its parameters would be listed once a layer.
        self.apply_to_query_key = positions.apply_to_query_key
        self.attend = attention  # an attribute, so that a trace can tell where attention begins and ends
        hidden_size = model.hidden_size
        # q, k and v of this rank's heads in one matrix product: three parts, each cut over the group.
        self.qkv = ColumnParallelLinear(hidden_size, 3 * hidden_size, parts=3, bias=model.bias, layout=layout)
        self.proj = RowParallelLinear(hidden_size, hidden_size, bias=model.bias, layout=layout)
        set_linear_init(self.qkv, model.init_std)
        set_linear_init(self.proj, residual_std(model))

    def forward(
        self,
        x_BSH: Tensor,
        micro_batch_key: int | None,
        bias: ScoreBias,
        *,
        documents: PackedDocuments | None = None,
        caches: Sequence[LayerCache] = (),
    ) -> Tensor:
        """Return what attention adds to the residual stream, [B, S, H]."""
        qkv = self.qkv(x_BSH)  # [B, S, 3AK], the whole sequence
        q_BSAK, k_BSAK, v_BSAK = split_qkv(qkv.unflatten(-1, (3, self.num_heads_local, -1)))
        if caches:
            q_BSAK, k_BSAK = self.apply_to_query_key(q_BSAK, k_BSAK, first=[cache.num_tokens for cache in caches])
            return self.proj(attend_rows(caches, q_BSAK, k_BSAK, v_BSAK, bias, backend=self.backend).flatten(2))
        q_BSAK, k_BSAK = self.apply_to_query_key(q_BSAK, k_BSAK)
        dropout_p = 0.0
        random: AbstractContextManager[None] = nullcontext()
        if self.dropout_p > 0.0 and micro_batch_key is not None:
            # Inside the tensor-parallel region: each rank drops on its own heads.
            site = Site.ATTENTION_WEIGHTS
            key = dropout_key(micro_batch_key, layer=self.layer, site=site, shard_rank=self.shard_rank)
            dropout_p, random = self.dropout_p, fork_rng(key, x_BSH.device)
        with random:
            y_BSAK = self.attend(
                q_BSAK,
                k_BSAK,
                v_BSAK,
                alibi_slopes=bias.alibi_slopes,
                distance_bias=bias.distance_bias,
                cu_seqlens=documents,
                dropout_p=dropout_p,
                backend=self.backend,
            )
        return self.proj(y_BSAK.flatten(2))

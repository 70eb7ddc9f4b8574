"""PyTorch's scaled_dot_product_attention with the exact fp32 bias, and without an S x S tensor.

The ALiBi bias of a head depends on the distance i - j alone. Read the queries backwards, i' = last - i, and it depends
on i' + j alone: all its rows are windows of one vector, each one step further on. A view with strides (1, 1) over that
vector is the whole bias in memory that is linear in S, and a kernel that takes any strides reads it as a mask.

A kernel that is given a mask computes the future too. Queries are therefore cut into a few blocks, and a block is shown
only the keys that its last query sees. Where a kernel needs the bias or the weights written out (masks on CUDA, dropout
on a CPU), blocks are small, and the backward makes each anew instead of keeping it: memory stays linear in S there too.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys it is shown.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from alibi_attention.backend import Capability
from alibi_attention.backends.distance_bias import attend_with_distance_bias
from alibi_attention.documents import PackedDocuments, attend_per_document

NAME = "sdpa"

# Of 1, 2, 4, 8 and 16 blocks, 4 were the fastest or close to it on a CPU at 1024 and 4096 tokens; each further block
# saves less work and adds another pass over the gradients of k and v.
_NUM_BLOCKS = 4
_MIN_BLOCK_QUERIES = 256


def capability() -> Capability:
    """Return what this back end can do."""
    return Capability(
        name=NAME,
        usable=True,
        reason="",
        exactness="bias, softmax and sums in fp32 (fp64 for fp64 inputs); memory linear in S",
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout="yes",
        cu_seqlens="loop over document lengths",
        distance_bias=True,
    )


def attend(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None,
    distance_bias: torch.Tensor | None,
    softmax_scale: float,
    documents: PackedDocuments | None,
    dropout_p: float,
    query_offset: int,
    horizon_eps: float,
) -> torch.Tensor:
    """Attend causally through PyTorch's SDPA, to all keys. See ``alibi_attention.attention`` for the arguments."""
    sdpa = partial(F.scaled_dot_product_attention, scale=softmax_scale, dropout_p=dropout_p)

    def attend_rows(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
        if distance_bias is not None:
            return attend_with_distance_bias(sdpa, q_BSHK, k_BSHK, v_BSHK, distance_bias, query_offset)
        # is_causal means query i sees keys 0..i, which is right only if both start at the same place.
        aligned = query_offset == 0 and q_BSHK.shape[1] == k_BSHK.shape[1]
        if alibi_slopes is None and aligned and (dropout_p == 0.0 or q_BSHK.device.type != "cpu"):
            q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
            return sdpa(q_BHSK, k_BHSK, v_BHSK, is_causal=True).transpose(1, 2)
        # Without slopes the mask does causality alone: slope 0, the same for all heads.
        slopes_H = q_BSHK.new_zeros(1) if alibi_slopes is None else alibi_slopes
        return _attend_blocks(sdpa, q_BSHK, k_BSHK, v_BSHK, slopes_H, query_offset)

    if documents is None:
        return attend_rows(q_BSHK, k_BSHK, v_BSHK)
    return attend_per_document(attend_rows, q_BSHK, k_BSHK, v_BSHK, documents)


def _attend_blocks(
    sdpa: partial[torch.Tensor],
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    slopes_H: torch.Tensor,
    query_offset: int,
) -> torch.Tensor:
    """Attend in blocks of queries, each to the keys up to its own end."""
    dtype, on_cpu = q_BSHK.dtype, q_BSHK.device.type == "cpu"
    if not on_cpu and dtype != torch.float64:
        # The CUDA kernels want the mask in the type of q: an exact bias has to be fp32, and so the rest.
        q_BSHK, k_BSHK, v_BSHK = (x.float() for x in (q_BSHK, k_BSHK, v_BSHK))
    slopes_H = slopes_H.to(torch.promote_types(q_BSHK.dtype, torch.float32))

    def attend_block(q_BQHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, end: int) -> torch.Tensor:
        mask_HQT = reversed_bias(slopes_H, q_BQHK.shape[1], k_BTHK.shape[1], end - 1)
        if not on_cpu:
            mask_HQT = mask_HQT.contiguous()  # the CUDA kernels read a mask in aligned rows
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BQHK.flip(1), k_BTHK, v_BTHK))
        return sdpa(q_BHQK, k_BHTK, v_BHTK, attn_mask=mask_HQT.unsqueeze(0)).transpose(1, 2).flip(1)

    num_queries, num_keys = q_BSHK.shape[1], k_BSHK.shape[1]
    written_out = not on_cpu or sdpa.keywords["dropout_p"] > 0.0
    block_queries = _MIN_BLOCK_QUERIES if written_out else max(_MIN_BLOCK_QUERIES, -(-num_queries // _NUM_BLOCKS))
    outputs, end = [], query_offset
    for q_BQHK in q_BSHK.split(block_queries, dim=1):
        end += q_BQHK.shape[1]  # the position after the block's last query
        block = (q_BQHK, k_BSHK[:, : min(end, num_keys)], v_BSHK[:, : min(end, num_keys)], end)
        outputs.append(checkpoint(attend_block, *block, use_reentrant=False) if written_out else attend_block(*block))
    return torch.cat(outputs, dim=1).to(dtype)


def reversed_bias(slopes_H: torch.Tensor, num_queries: int, num_keys: int, last_position: int) -> torch.Tensor:
    """Return the ALiBi bias of queries in reverse order, -inf for the future: a view [H, Q, T] of O(Q + T) numbers.

    Element [h, i', j] is the bias between key j and the query at position ``last_position - i'``.

    Args:
        slopes_H: Slope of each head, in the type the bias shall have.
        num_queries: Queries, at the positions ``last_position - num_queries + 1`` to ``last_position``.
        num_keys: Keys, at the positions 0 to ``num_keys - 1``.
        last_position: Position of the last query, which is the first row.
    """
    steps = torch.arange(num_queries + num_keys - 1, device=slopes_H.device)
    distance = last_position - steps  # an integer, exact at any length; the product is rounded once
    bias_by_step = (-slopes_H[:, None] * distance).masked_fill(distance < 0, -torch.inf)
    return bias_by_step.as_strided((len(slopes_H), num_queries, num_keys), (bias_by_step.stride(0), 1, 1))

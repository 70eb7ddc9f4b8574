"""PyTorch's scaled_dot_product_attention with the exact fp32 bias, and without an S x S tensor.

The bias of a head, by slope or by table, depends on the distance i - j alone. Read the queries backwards,
i' = last - i, and it depends on i' + j alone: its rows are windows of one vector, each one step further on. A view with
strides (1, 1) over that vector is the whole bias in memory that is linear in S, and a kernel that takes any strides
reads it as a mask.

A kernel that is given a mask also computes the future. Queries are therefore cut into a few blocks, and a block is
shown only the keys that its last query sees. Where a kernel needs the bias or the weights written out (masks on CUDA,
dropout on a CPU, the gradient of a table), blocks are small, and the backward pass makes each anew instead of keeping
it: memory stays linear in S there too.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys it is shown, D distances.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.documents import attend_per_document

NAME = "sdpa"

# Of 1, 2, 4, 8 and 16 blocks, 4 were the fastest or close to it on a CPU at 1024 and 4096 tokens; each further block
# saves less work and adds another pass over the gradients of k and v.
_NUM_BLOCKS = 4
MIN_BLOCK_QUERIES = 256
"""Queries of a block where the bias or the weights are written out, and the fewest of any other block."""

MakeMask = Callable[[int, int, int], torch.Tensor]
"""Returns the mask [H, Q, T] of a block, for its numbers of queries and keys and the position of its last query."""


def capability() -> Capability:
    """Return what this back end can do."""
    return Capability(
        name=NAME,
        usable=True,
        reason="",
        exactness="bias, softmax and sums in fp32 (fp64 for fp64 inputs); memory linear in S",
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout=True,
        cu_seqlens="loop over document lengths",
        distance_bias=True,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally to all keys, through PyTorch's SDPA."""

    def attend_rows(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
        # is_causal means query i sees keys 0..i, which is right only if both start at the same place.
        aligned = inputs.query_offset == 0 and q_BSHK.shape[1] == k_BSHK.shape[1]
        no_bias = inputs.alibi_slopes is None and inputs.distance_bias is None
        if no_bias and aligned and (inputs.dropout_p == 0.0 or q_BSHK.device.type != "cpu"):
            q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
            return _bind_sdpa(inputs)(q_BHSK, k_BHSK, v_BHSK, is_causal=True).transpose(1, 2)
        return _attend_blocks(inputs, q_BSHK, k_BSHK, v_BSHK)

    return attend_per_document(attend_rows, *inputs.qkv, inputs.documents)


def _bind_sdpa(inputs: AttentionInputs) -> Callable[..., torch.Tensor]:
    """Return PyTorch's SDPA with the numbers of a call, and without its tensors."""
    return partial(F.scaled_dot_product_attention, scale=inputs.softmax_scale, dropout_p=inputs.dropout_p)


def _attend_blocks(
    inputs: AttentionInputs, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor
) -> torch.Tensor:
    """Attend in blocks of queries, each to the keys up to its own end."""
    dtype, on_cpu = q_BSHK.dtype, q_BSHK.device.type == "cpu"
    if not on_cpu and dtype != torch.float64:
        # The CUDA kernels want the mask in the type of q: an exact bias has to be fp32, and so the rest.
        q_BSHK, k_BSHK, v_BSHK = (x.float() for x in (q_BSHK, k_BSHK, v_BSHK))
    make_mask, choose_kernel = _choose_mask(inputs, torch.promote_types(q_BSHK.dtype, torch.float32))
    call_sdpa = _bind_sdpa(inputs)

    # The backward pass keeps what this function refers to: with ``inputs`` it would keep q, k and v in 16 bits beside
    # their fp32 copies.
    def attend_block(q_BQHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, end: int) -> torch.Tensor:
        mask_HQT = make_mask(q_BQHK.shape[1], k_BTHK.shape[1], end - 1)
        if not on_cpu:
            mask_HQT = mask_HQT.contiguous()  # the CUDA kernels read a mask in aligned rows
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BQHK.flip(1), k_BTHK, v_BTHK))
        with choose_kernel():
            output_BHQK = call_sdpa(q_BHQK, k_BHTK, v_BHTK, attn_mask=mask_HQT.unsqueeze(0))
        return output_BHQK.transpose(1, 2).flip(1)

    num_queries, num_keys = q_BSHK.shape[1], k_BSHK.shape[1]
    written_out = not on_cpu or inputs.dropout_p > 0.0 or inputs.distance_bias is not None
    block_queries = MIN_BLOCK_QUERIES if written_out else max(MIN_BLOCK_QUERIES, -(-num_queries // _NUM_BLOCKS))
    recompute = written_out and torch.is_grad_enabled() and num_queries > block_queries
    outputs, end = [], inputs.query_offset
    for q_BQHK in q_BSHK.split(block_queries, dim=1):
        end += q_BQHK.shape[1]  # the position after the block's last query
        block = (q_BQHK, k_BSHK[:, : min(end, num_keys)], v_BSHK[:, : min(end, num_keys)], end)
        outputs.append(checkpoint(attend_block, *block, use_reentrant=False) if recompute else attend_block(*block))
    return torch.cat(outputs, dim=1).to(dtype)


def _choose_mask(
    inputs: AttentionInputs, dtype: torch.dtype
) -> tuple[MakeMask, Callable[[], AbstractContextManager[Any]]]:
    """Return what makes the mask of a block, in ``dtype``, and what chooses PyTorch's kernel for it."""
    bias_HD, slopes_H = inputs.distance_bias, inputs.alibi_slopes
    if bias_HD is None:
        # Without slopes the mask serves causality alone: slope 0, the same for all heads.
        slopes_H = inputs.q.new_zeros(1) if slopes_H is None else slopes_H
        return partial(reversed_bias, slopes_H.to(dtype)), nullcontext
    # One kernel gives the gradient of the bias. It is also named in a forward pass without gradients that activation
    # checkpointing repeats with them: another kernel would round otherwise.
    choose_kernel = partial(sdpa_kernel, SDPBackend.MATH) if bias_HD.requires_grad else nullcontext
    return partial(reversed_distance_bias, bias_HD.to(dtype)), choose_kernel


def reversed_bias(slopes_H: torch.Tensor, num_queries: int, num_keys: int, last_position: int) -> torch.Tensor:
    """Return the ALiBi bias of queries in reverse order, -inf for the future: a view [H, Q, T] of O(Q + T) numbers.

    Element [h, i', j] is the bias between key j and the query at position ``last_position - i'``.

    Args:
        slopes_H: Slope of each head, in the type that the bias shall have.
        num_queries: Number of queries, at the positions ``last_position - num_queries + 1`` to ``last_position``.
        num_keys: Number of keys, at the positions 0 to ``num_keys - 1``.
        last_position: Position of the last query, which is the first row.
    """
    steps = torch.arange(num_queries + num_keys - 1, device=slopes_H.device)
    distance = last_position - steps  # an integer, exact at any length; the product is rounded once
    bias_by_step = (-slopes_H[:, None] * distance).masked_fill(distance < 0, -torch.inf)
    return bias_by_step.as_strided((len(slopes_H), num_queries, num_keys), (bias_by_step.stride(0), 1, 1))


def reversed_distance_bias(bias_HD: torch.Tensor, num_queries: int, num_keys: int, last_position: int) -> torch.Tensor:
    """Return a table's bias of queries in reverse order, as ``reversed_bias`` returns that of slopes.

    Args:
        bias_HD: Bias of each head at the distances 0, 1, 2, ..., at least up to ``last_position``.
        num_queries: Number of queries, at the positions ``last_position - num_queries + 1`` to ``last_position``.
        num_keys: Number of keys, at the positions 0 to ``num_keys - 1``.
        last_position: Position of the last query, which is the first row.
    """
    distance = last_position - torch.arange(num_queries + num_keys - 1, device=bias_HD.device)
    bias_by_step = bias_HD[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)
    return _Windows.apply(bias_by_step, num_queries)


class _Windows(torch.autograd.Function):
    """[H, Q + T - 1] -> the Q windows of T steps, each one step further on: a view [H, Q, T].

    Its gradient sums the elements that are one number, those with the same i' + j. PyTorch's own gradient of such a
    view adds them up one by one; here rows are shifted by padding each to Q + T and reading the result in rows of
    Q + T - 1.
    """

    @staticmethod
    def forward(ctx: Any, by_step: torch.Tensor, num_windows: int) -> torch.Tensor:
        num_heads, num_steps = by_step.shape
        return by_step.as_strided((num_heads, num_windows, num_steps + 1 - num_windows), (by_step.stride(0), 1, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_HQT: torch.Tensor) -> tuple[torch.Tensor, None]:
        num_heads, num_windows, length = grad_HQT.shape
        shifted = F.pad(grad_HQT, (0, num_windows)).flatten(1)[:, :-num_windows]
        return shifted.view(num_heads, num_windows, length + num_windows - 1).sum(1), None

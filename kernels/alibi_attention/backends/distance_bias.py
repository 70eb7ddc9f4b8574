"""Attention with a bias that is a table over distances, as T5's learned one, through PyTorch's SDPA in linear memory.

As in sdpa.py: with the queries in reverse order every row of the bias is a window of one vector, and blocks of queries
are shown only the keys that their last query sees. The table may require a gradient. PyTorch then has one kernel, which
writes the weights of a block out; with more than one block the backward makes each anew instead of keeping it.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys it is shown, D distances.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

_BLOCK_QUERIES = 256


def attend_with_distance_bias(
    sdpa: partial[torch.Tensor],
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    bias_HD: torch.Tensor,
    query_offset: int,
) -> torch.Tensor:
    """Attend causally, block by block.

    Args:
        sdpa: PyTorch's function with its scale and dropout.
        q_BSHK: Queries; none stands beyond the last key.
        k_BSHK: Keys.
        v_BSHK: Values.
        bias_HD: Of each head at every distance that occurs, fp32 or wider.
        query_offset: Position of the first query.
    """
    dtype, on_cpu = q_BSHK.dtype, q_BSHK.device.type == "cpu"
    if not on_cpu and dtype != torch.float64:
        # The CUDA kernels want the mask in the type of q: an exact bias has to be fp32, and so the rest.
        q_BSHK, k_BSHK, v_BSHK = (x.float() for x in (q_BSHK, k_BSHK, v_BSHK))
    bias_HD = bias_HD.to(torch.promote_types(q_BSHK.dtype, torch.float32))
    # The kernel that gives the gradient of the bias, also in a forward pass without gradients that activation
    # checkpointing repeats: another one would round otherwise.
    kernels = partial(sdpa_kernel, SDPBackend.MATH) if bias_HD.requires_grad else nullcontext

    def attend_block(q_BQHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, end: int) -> torch.Tensor:
        mask_HQT = reversed_distance_bias(bias_HD, q_BQHK.shape[1], k_BTHK.shape[1], end - 1)
        if not on_cpu:
            mask_HQT = mask_HQT.contiguous()  # the CUDA kernels read a mask in aligned rows
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BQHK.flip(1), k_BTHK, v_BTHK))
        with kernels():
            return sdpa(q_BHQK, k_BHTK, v_BHTK, attn_mask=mask_HQT.unsqueeze(0)).transpose(1, 2).flip(1)

    recompute = torch.is_grad_enabled() and q_BSHK.shape[1] > _BLOCK_QUERIES
    outputs, end = [], query_offset
    for q_BQHK in q_BSHK.split(_BLOCK_QUERIES, dim=1):
        end += q_BQHK.shape[1]  # the position after the block's last query
        block = (q_BQHK, k_BSHK[:, :end], v_BSHK[:, :end], end)
        outputs.append(checkpoint(attend_block, *block, use_reentrant=False) if recompute else attend_block(*block))
    return torch.cat(outputs, dim=1).to(dtype)


def reversed_distance_bias(bias_HD: torch.Tensor, num_queries: int, num_keys: int, last_position: int) -> torch.Tensor:
    """Return the bias of queries in reverse order, -inf for the future: a view [H, Q, T] of O(Q + T) numbers.

    Element [h, i', j] is the bias between key j and the query at position ``last_position - i'``.

    Args:
        bias_HD: Of each head at the distances 0, 1, 2, ..., ``last_position`` at least.
        num_queries: Queries, at the positions ``last_position - num_queries + 1`` to ``last_position``.
        num_keys: Keys, at the positions 0 to ``num_keys - 1``.
        last_position: Position of the last query, which is the first row.
    """
    distance = last_position - torch.arange(num_queries + num_keys - 1, device=bias_HD.device)
    bias_by_step = bias_HD[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)
    return _Windows.apply(bias_by_step, num_queries)


class _Windows(torch.autograd.Function):
    """[H, Q + T - 1] -> the Q windows of T steps, each one step further on: a view [H, Q, T].

    Its gradient sums the elements that are one number, those with the same i' + j. PyTorch's own for such a view adds
    them up one by one; here rows are shifted by padding each to Q + T and reading the result in rows of Q + T - 1.
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

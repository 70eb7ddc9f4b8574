"""q, k and v that are parts of one tensor, as a model's one matrix product makes them, and their gradients likewise.

The gradient of a tensor that was split is put together from the gradients of its parts. That copies all three, unless
a back end has written dq, dk and dv into one buffer from the beginning: ``empty_gradients`` allocates that buffer, and
the backward pass of ``split_qkv`` recognises it.

Shape suffixes: B batch, S sequence, H heads, K head dimension.
"""

from __future__ import annotations

from typing import Any

import torch

_PARTS = 3
_PARTS_DIM = 2


def split_qkv(qkv_BS3HK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v [B, S, H, K], views of one tensor [B, S, 3, H, K]."""
    return _Split.apply(qkv_BS3HK)


def empty_gradients(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return memory for dq, dk and dv: parts of one tensor if q, k and v are, else a dense tensor each.

    dk and dv have the same strides in both cases.
    """
    if _find_whole(q_BSHK, k_BSHK, v_BSHK) is None:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BSHK, k_BSHK, v_BSHK))
    else:
        shape = (*q_BSHK.shape[:_PARTS_DIM], _PARTS, *q_BSHK.shape[_PARTS_DIM:])
        dq, dk, dv = torch.empty(shape, dtype=q_BSHK.dtype, device=q_BSHK.device).unbind(_PARTS_DIM)
    return dq, dk, dv


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BS3HK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv_BS3HK.unbind(_PARTS_DIM)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
        whole = _find_whole(dq, dk, dv)
        return torch.stack([dq, dk, dv], _PARTS_DIM) if whole is None else whole


def _find_whole(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor | None:
    """Return the dense tensor [B, S, 3, H, K] whose parts three tensors are, if there is one."""
    batch, seq_length, num_heads, head_dim = q_BSHK.shape
    size = num_heads * head_dim
    strides = (seq_length * _PARTS * size, _PARTS * size, head_dim, 1)
    storage = q_BSHK.untyped_storage()._cdata  # not its address, which is 0 for all tensors of the meta device
    for number, x in enumerate((q_BSHK, k_BSHK, v_BSHK)):
        if (x.shape, x.dtype, x.stride()) != (q_BSHK.shape, q_BSHK.dtype, strides):
            return None
        if x.untyped_storage()._cdata != storage or x.storage_offset() != q_BSHK.storage_offset() + number * size:
            return None
    shape, offset = (batch, seq_length, _PARTS, num_heads, head_dim), q_BSHK.storage_offset()
    return q_BSHK.as_strided(shape, (*strides[:2], size, head_dim, 1), offset)

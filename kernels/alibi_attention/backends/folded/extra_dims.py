"""The folded bias on a GPU: m j as an inner product of a few extra head dimensions.

No GPU kernel takes a bias by column without slowing down, but any plain causal kernel adds an inner product to q.k at
no cost. The matrix units multiply the inputs exactly and sum in fp32. What would be lost is lost when position and
slope are rounded to the inputs' type; both are therefore split into pieces that this type holds exactly: the position
into two terms of 8 bits or more, m / softmax_scale into three.

FlashBias (arXiv:2505.12044) takes biases of low rank so, ALiBi among them. The ALiBi example of its code
(1_Language_Model in github.com/thuml/FlashBias at commit 184fac9) casts the factors to fp16, which has whole numbers
exactly up to 2,048.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries, T keys, V keys that a query sees, P pieces:
S of the slope times R of the position.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_SLOPE_TERMS = 3
_PIECE_BITS = 8
_TWO_TERM_KEYS = 2**17  # counted from the middle, 16 bits and a sign: twice 8 bits, rounded to the nearest
# Fast kernels want a head dimension that is a multiple of 8.
_HEAD_DIM_MULTIPLE = 8


def attend_with_extra_dims(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    slopes_H: torch.Tensor,
    softmax_scale: float,
    query_offset: int,
) -> torch.Tensor:
    """Attend to all keys through PyTorch's SDPA without a mask, the bias folded into the head dimension."""
    num_queries, num_keys, head_dim = q_BSHK.shape[1], k_BSHK.shape[1], q_BSHK.shape[3]
    slope_HP, position_THP = fold(slopes_H, softmax_scale, num_keys, q_BSHK.dtype)
    padding = -(head_dim + slope_HP.shape[1]) % _HEAD_DIM_MULTIPLE
    q_BHQK = torch.cat((q_BSHK, slope_HP.expand(*q_BSHK.shape[:3], -1)), -1).transpose(1, 2)
    k_BHTK = torch.cat((k_BSHK, position_THP.expand(*k_BSHK.shape[:3], -1)), -1).transpose(1, 2)
    q_BHQK, k_BHTK = F.pad(q_BHQK, (0, padding)), F.pad(k_BHTK, (0, padding))
    v_BHTK = F.pad(v_BSHK.transpose(1, 2), (0, slope_HP.shape[1] + padding))

    # Queries up to the last key are a causal triangle with its corner at the lower right; those beyond see all keys.
    from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

    inside = max(0, min(num_queries, num_keys - query_offset))
    outputs = []
    if inside:
        visible = query_offset + inside
        # is_causal wants a square. The other form is the same kernel, where there is one.
        causal = {"is_causal": True} if visible == inside else {"attn_mask": causal_lower_right(inside, visible)}
        k_BHVK, v_BHVK = k_BHTK[:, :, :visible], v_BHTK[:, :, :visible]
        outputs.append(_sdpa(q_BHQK[:, :, :inside], k_BHVK, v_BHVK, softmax_scale, causal))
    if inside < num_queries:
        outputs.append(_sdpa(q_BHQK[:, :, inside:], k_BHTK, v_BHTK, softmax_scale, {}))
    return torch.cat(outputs, dim=2)[..., :head_dim].transpose(1, 2)


def _sdpa(
    q_BHQK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, softmax_scale: float, causal: dict[str, Any]
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q_BHQK, k_BHTK, v_BHTK, scale=softmax_scale, **causal)


def fold(
    slopes_H: torch.Tensor, softmax_scale: float, num_keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pieces [H, P] and [T, H, P] in ``dtype`` whose inner product is slope / softmax_scale * (j - T // 2).

    The products are exact in fp32, and off from the bias of the fp32 slope by 2^-24 of it at most.
    """
    # fp32 gets pieces of 8 bits as well: a GPU may be told to multiply fp32 in TF32, which holds 11.
    piece_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    mantissa_H, exponent_H = torch.frexp(slopes_H.double() / softmax_scale)
    position_T = torch.arange(num_keys, dtype=torch.float64, device=slopes_H.device) - num_keys // 2
    # The power of two stands with the position, where fp16 has no small remainders that it would lose.
    power_H = torch.ldexp(torch.ones_like(mantissa_H), exponent_H - _PIECE_BITS)
    slope_HS = _split(mantissa_H * 2.0**_PIECE_BITS, _SLOPE_TERMS, piece_dtype)
    position_THR = _split(position_T[:, None] * power_H, 2 if num_keys <= _TWO_TERM_KEYS else 3, piece_dtype)
    slope_HSR = slope_HS[..., None].expand(*slope_HS.shape, position_THR.shape[-1])
    position_THSR = position_THR[..., None, :].expand(-1, *slope_HSR.shape)
    return slope_HSR.flatten(1).to(dtype), position_THSR.flatten(2).to(dtype)


def _split(x: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers that ``dtype`` holds and whose sum is x, along a new last dimension."""
    pieces = []
    for _ in range(terms):
        pieces.append(x.to(dtype).double())
        x = x - pieces[-1]
    return torch.stack(pieces, dim=-1)

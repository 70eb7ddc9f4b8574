"""ALiBi on a kernel that knows no ALiBi: the bias in a form that a plain causal kernel takes.

A softmax ignores a number added to its whole row, so the bias -m (i - j) may be replaced by +m j: one number for a key.
On a CPU that is a bias by column, with local blocks for heads with a short horizon (folded_cpu.py).

On a GPU no kernel takes one without slowing down, so m j becomes an inner product of a few extra head dimensions, and
any plain causal kernel adds it to q.k for nothing. The matrix units multiply the inputs exactly and sum in fp32; what
would be lost is lost when position and slope are rounded to the inputs' type. Both are therefore split into pieces that
it holds exactly: the position into two terms of 8 bits or more, m / softmax_scale into three.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries, T keys, V keys that a
query sees, P pieces: S of the slope times R of the position.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from alibi_attention.backend import Capability
from alibi_attention.backends.folded.cpu import AttendInParts, find_missing, group_heads, plan_head
from alibi_attention.documents import PackedDocuments, attend_per_document
from alibi_attention.horizon import find_horizons

NAME = "folded"

_SLOPE_TERMS = 3
_PIECE_BITS = 8
_TWO_TERM_KEYS = 2**17  # counted from the middle, 16 bits and a sign: twice 8 bits, rounded to the nearest
# Fast kernels want a head dimension that is a multiple of 8.
_HEAD_DIM_MULTIPLE = 8
_HALF_FP64_STEP = torch.finfo(torch.float64).eps / 2


@cache
def capability() -> Capability:
    """Return what this back end can do."""
    missing = find_missing()
    return Capability(
        name=NAME,
        usable=True,
        reason=missing,
        exactness="bias, softmax and sums in fp32 (fp64 for fp64 inputs); positions count from a block on cpu, from the"
        " middle of the sequence on cuda, which costs digits far from it; memory linear in S; horizon on cpu alone",
        devices=("cuda",) if missing else ("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout="",
        cu_seqlens="loop over document lengths",
        horizon=True,
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
    """Attend causally, to the keys within each head's horizon. See ``alibi_attention.attention`` for the arguments."""
    slopes_H = q_BSHK.new_zeros(q_BSHK.shape[2], dtype=torch.float32) if alibi_slopes is None else alibi_slopes
    if q_BSHK.dtype == torch.float64:
        # The default is half a rounding step of fp32; who computes in fp64 wants to see fp64.
        horizon_eps = min(horizon_eps, _HALF_FP64_STEP)

    def attend_rows(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
        if q_BSHK.device.type != "cpu":
            return attend_with_extra_dims(q_BSHK, k_BSHK, v_BSHK, slopes_H, softmax_scale, query_offset)
        return _attend_on_cpu(q_BSHK, k_BSHK, v_BSHK, slopes_H, softmax_scale, query_offset, horizon_eps)

    if documents is None:
        return attend_rows(q_BSHK, k_BSHK, v_BSHK)
    return attend_per_document(attend_rows, q_BSHK, k_BSHK, v_BSHK, documents)


def _attend_on_cpu(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    v_BSHK: torch.Tensor,
    slopes_H: torch.Tensor,
    softmax_scale: float,
    query_offset: int,
    horizon_eps: float,
) -> torch.Tensor:
    q_BSHK, k_BSHK, v_BSHK = (_with_plain_rows(x) for x in (q_BSHK, k_BSHK, v_BSHK))
    horizons = find_horizons(
        q_BSHK,
        k_BSHK,
        slopes_H,
        softmax_scale=softmax_scale,
        horizon_eps=horizon_eps,
        query_offset=query_offset,
    )
    plans = [
        plan_head(horizon, slope, q_BSHK.shape[1], k_BSHK.shape[1], query_offset, q_BSHK.dtype)
        for horizon, slope in zip(horizons.tolist(), slopes_H.tolist(), strict=True)
    ]
    bias_dtype = torch.promote_types(q_BSHK.dtype, torch.float32)
    return AttendInParts.apply(
        q_BSHK, k_BSHK, v_BSHK, slopes_H.to(bias_dtype), group_heads(plans), softmax_scale, query_offset
    )


def _with_plain_rows(x_BSHK: torch.Tensor) -> torch.Tensor:
    """Return x, copied if the matrix products cannot read it: rows have to be contiguous and must not overlap."""
    is_plain = x_BSHK.stride(3) == 1 and (x_BSHK.shape[1] == 1 or x_BSHK.stride(1) >= x_BSHK.shape[3])
    return x_BSHK if is_plain else x_BSHK.contiguous()


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

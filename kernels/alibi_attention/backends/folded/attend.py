"""ALiBi on a kernel that knows no ALiBi: the bias in a form that a plain causal kernel takes.

A softmax ignores a number added to its whole row, so the bias -m (i - j) may be replaced by +m j: one number for a key.
On a CPU that is a bias by column, with local blocks for heads with a short horizon (cpu.py). On a GPU it is an inner
product of a few extra head dimensions (extra_dims.py).

Shape suffixes: B batch, S sequence, H heads, K head dimension.
"""

from __future__ import annotations

from functools import cache

import torch

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.backends.folded.cpu import AttendInParts, find_missing, group_heads, plan_head
from alibi_attention.backends.folded.extra_dims import attend_with_extra_dims
from alibi_attention.documents import attend_per_document
from alibi_attention.horizon import find_horizons

NAME = "folded"

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
        dropout=False,
        cu_seqlens="loop over document lengths",
        horizon=True,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally, on a CPU to the keys within each head's horizon, elsewhere to all."""
    q_BSHK, slopes_H, horizon_eps = inputs.q, inputs.alibi_slopes, inputs.horizon_eps
    softmax_scale, query_offset = inputs.softmax_scale, inputs.query_offset
    if slopes_H is None:
        slopes_H = q_BSHK.new_zeros(q_BSHK.shape[2], dtype=torch.float32)
    if q_BSHK.dtype == torch.float64:
        # The default is half a rounding step of fp32, which would be visible in fp64.
        horizon_eps = min(horizon_eps, _HALF_FP64_STEP)

    def attend_rows(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
        if q_BSHK.device.type != "cpu":
            return attend_with_extra_dims(q_BSHK, k_BSHK, v_BSHK, slopes_H, softmax_scale, query_offset)
        return _attend_on_cpu(q_BSHK, k_BSHK, v_BSHK, slopes_H, softmax_scale, query_offset, horizon_eps)

    return attend_per_document(attend_rows, *inputs.qkv, inputs.documents)


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
    """Return x, copied if the matrix products cannot read it: its rows must be contiguous and must not overlap."""
    is_plain = x_BSHK.stride(3) == 1 and (x_BSHK.shape[1] == 1 or x_BSHK.stride(1) >= x_BSHK.shape[3])
    return x_BSHK if is_plain else x_BSHK.contiguous()

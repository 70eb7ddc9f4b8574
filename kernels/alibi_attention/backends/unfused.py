"""Attention as it was before fused kernels: scores and weights of all pairs of tokens, products in the type of q.

This is what the paper's code computed (fairseq's multi-head attention: both products in 16 bits, the softmax in fp32
and its weights rounded to 16 bits), except that the bias is fp32 here as everywhere. Fused attention is compared with
it for time and memory; for exact numbers there is reference.py. The bias is formed anew in each call, while fairseq's
model keeps it, so that ALiBi takes somewhat longer here than it did there.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries, T keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alibi_attention.backend import AttentionInputs, Capability
from alibi_attention.documents import attend_per_document

NAME = "unfused"


def capability() -> Capability:
    """Return what this back end can do: everything, but with S x S memory."""
    return Capability(
        name=NAME,
        usable=True,
        reason="",
        exactness="products rounded to the type of q, bias and softmax in fp32 (fp64 for fp64 inputs); S x S memory",
        devices=("cpu", "cuda", "meta"),  # on meta it plans the memory of what it does elsewhere
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout=True,
        cu_seqlens="loop over document lengths",
        distance_bias=True,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally to all keys, with scores and weights written out."""

    def attend_rows(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor) -> torch.Tensor:
        softmax_dtype = torch.promote_types(q_BSHK.dtype, torch.float32)
        q_BHQK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
        scores_BHQT = (inputs.softmax_scale * q_BHQK) @ k_BHTK.mT
        position_Q = inputs.query_offset + torch.arange(q_BHQK.shape[2], device=q_BSHK.device)
        distance_QT = position_Q[:, None] - torch.arange(k_BHTK.shape[2], device=q_BSHK.device)
        bias_HQT = _bias_of(distance_QT, inputs.alibi_slopes, inputs.distance_bias, softmax_dtype)
        weights_BHQT = (scores_BHQT + bias_HQT).softmax(dim=-1).to(q_BSHK.dtype)
        return (F.dropout(weights_BHQT, inputs.dropout_p) @ v_BHTK).transpose(1, 2)

    return attend_per_document(attend_rows, *inputs.qkv, inputs.documents)


def _bias_of(
    distance_QT: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    distance_bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return what is added to the scores, [H or 1, Q, T]: the bias, and -inf for the future."""
    if alibi_slopes is not None:
        bias_HQT = -alibi_slopes.to(dtype)[:, None, None] * distance_QT
    elif distance_bias is not None:
        bias_HQT = distance_bias.to(dtype)[:, distance_QT.clamp(0, distance_bias.shape[1] - 1)]
    else:
        bias_HQT = torch.zeros(1, 1, 1, dtype=dtype, device=distance_QT.device)
    return bias_HQT.masked_fill(distance_QT < 0, -torch.inf)

"""The equation, written out: every other back end is compared with this one.

softmax(softmax_scale * q k^T - slope * (i - j)) v over the keys j <= i of the query's own document; or, with a distance
bias, + bias[i - j] in place of the slope's term.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries, T keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alibi_attention.backend import AttentionInputs, Capability

NAME = "reference"


def capability() -> Capability:
    """Return what this back end can do: everything, but with S x S memory."""
    return Capability(
        name=NAME,
        usable=True,
        reason="",
        exactness="everything in fp32 (fp64 for fp64 inputs); S x S memory",
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        dropout=True,
        cu_seqlens="one mask over all tokens",
        distance_bias=True,
    )


def attend(inputs: AttentionInputs) -> torch.Tensor:
    """Attend causally to all keys, by the equation."""
    q_BSHK, k_BSHK, v_BSHK = inputs.q, inputs.k, inputs.v
    alibi_slopes, distance_bias, documents = inputs.alibi_slopes, inputs.distance_bias, inputs.documents
    if documents is not None:
        batch, seq_length = q_BSHK.shape[:2]
        q_BSHK, k_BSHK, v_BSHK = (x.flatten(0, 1).unsqueeze(0) for x in (q_BSHK, k_BSHK, v_BSHK))

    compute_dtype = torch.float64 if q_BSHK.dtype == torch.float64 else torch.float32
    q_BHQK, k_BHTK, v_BHTK = (x.to(compute_dtype).transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    scores_BHQT = inputs.softmax_scale * (q_BHQK @ k_BHTK.mT)

    queries, keys = q_BHQK.shape[2], k_BHTK.shape[2]
    position_Q = inputs.query_offset + torch.arange(queries, device=q_BSHK.device)
    distance_QT = position_Q[:, None] - torch.arange(keys, device=q_BSHK.device)
    if alibi_slopes is not None:
        scores_BHQT = scores_BHQT - alibi_slopes.to(compute_dtype)[:, None, None] * distance_QT
    if distance_bias is not None:
        scores_BHQT = scores_BHQT + distance_bias.to(compute_dtype)[:, distance_QT.clamp(0, distance_bias.shape[1] - 1)]

    visible_QT = distance_QT >= 0
    if documents is not None:
        lengths = torch.tensor(documents.lengths, device=q_BSHK.device)
        document_Q = torch.repeat_interleave(torch.arange(len(lengths), device=q_BSHK.device), lengths)
        visible_QT = visible_QT & (document_Q[:, None] == document_Q)

    weights_BHQT = scores_BHQT.masked_fill(~visible_QT, -torch.inf).softmax(dim=-1)
    weights_BHQT = F.dropout(weights_BHQT, inputs.dropout_p)
    output_BSHK = (weights_BHQT @ v_BHTK).transpose(1, 2).to(q_BSHK.dtype)
    return output_BSHK if documents is None else output_BSHK.unflatten(1, (batch, seq_length)).squeeze(0)

"""How many pairs of query and key a proof keeps: our horizon beside the threshold of arXiv:2504.06949, at one eps.

Both leave out keys of which they prove that they hold at most eps of a row's weights; horizon.py compares the two
bounds in words. Theirs is read as their code computes it: ``adaptive_threshold="auto"``, lines 91 to 102 of
src/forgetting_transformer/ops/forgetting_attention.py in github.com/zhixuan-lin/forgetting-transformer at commit
883f260. Here eps stands in place of their exp(-10), and ALiBi's constant decay in place of a learned one. A pair is
left out if -slope (i - j) < ln eps - ln S - 2 U, with U = |c| max |q_i| max |k_j| over the sequence of a head. The
bound assumes that no |c q.k| is above U, which holds by Cauchy and Schwarz: then a key that is left out scores below
-U - ln(S / eps), a query's own key scores at least -U, and there are at most S keys.

Single pairs are counted. Kernels leave out whole blocks, theirs as ours, so each computes somewhat more.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q some queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from alibi_attention.bench.peers import find_forget_gate
from alibi_attention.horizon import find_horizons, find_query_horizons

_ROWS = 256  # of weights that are formed at once


class KeptPairs(NamedTuple):
    """Pairs of all sequences of a batch that are kept, of each head."""

    causal: list[int]
    """All pairs with j <= i: what a kernel without a proof computes."""
    threshold: list[int]
    """Those of arXiv:2504.06949: one distance for a head of a sequence."""
    head_horizon: list[int]
    """Those of one distance for a head, the largest that any of its queries needs, as ``folded`` on a CPU has it."""
    query_horizon: list[int]
    """Those of a distance for each query, which ``native`` and ``triton`` ask of each block of queries."""
    needed: list[int]
    """The fewest nearest keys of each query that hold all but eps of its weights; only the weights tell."""


@torch.no_grad()
def count_kept_pairs(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, slopes_H: torch.Tensor, *, horizon_eps: float
) -> KeptPairs:
    """Count the pairs that each bound keeps; the softmax scale is that of the head dimension.

    Args:
        q_BSHK: Queries, at the positions of the keys.
        k_BSHK: Keys.
        slopes_H: Slope of each head.
        horizon_eps: Largest share of a row's weights that may be left out, above 0.
    """
    scale = q_BSHK.shape[-1] ** -0.5
    bounds = {"softmax_scale": scale, "horizon_eps": horizon_eps, "query_offset": 0}
    _, decay_BH = find_forget_gate(q_BSHK, k_BSHK, slopes_H, horizon_eps)
    by_distance = {
        "causal": torch.full_like(decay_BH, q_BSHK.shape[1])[:, None],
        "threshold": (-decay_BH.double() / slopes_H.double()).floor()[:, None],
        "head_horizon": find_horizons(q_BSHK, k_BSHK, slopes_H, **bounds).expand(len(q_BSHK), 1, -1),
        "query_horizon": find_query_horizons(q_BSHK, k_BSHK, slopes_H, **bounds),
        "needed": _find_needed(q_BSHK, k_BSHK, slopes_H, scale, horizon_eps),
    }
    past_S1 = torch.arange(q_BSHK.shape[1], device=q_BSHK.device)[:, None]
    kept = {name: torch.minimum(past_S1, distance) + 1 for name, distance in by_distance.items()}
    return KeptPairs(**{name: kept_BSH.sum((0, 1)).long().tolist() for name, kept_BSH in kept.items()})


def _find_needed(
    q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, slopes_H: torch.Tensor, scale: float, horizon_eps: float
) -> torch.Tensor:
    """Return the distance to which each query needs its keys, int64 [B, S, H], from its weights in fp64."""
    key_S = torch.arange(k_BSHK.shape[1], device=k_BSHK.device)
    distances = []
    for q_BQHK, query_Q in zip(q_BSHK.split(_ROWS, dim=1), key_S.split(_ROWS), strict=True):
        behind_QS = query_Q[:, None] - key_S
        scores_BHQS = scale * torch.einsum("bqhk,bshk->bhqs", q_BQHK.double(), k_BSHK.double())
        scores_BHQS -= slopes_H.double()[:, None, None] * behind_QS
        scores_BHQS.masked_fill_(behind_QS < 0, -torch.inf)
        # The farthest keys are the first: those whose weights sum to eps or less may go.
        gone_BHQ = (scores_BHQS.softmax(-1).cumsum(-1) <= horizon_eps).sum(-1)
        distances.append(query_Q - gone_BHQ)
    return torch.cat(distances, dim=-1).transpose(1, 2)

"""How far a head can see: past its horizon, all keys together provably hold no more than eps of a query's attention.

Query i scores key j <= i with s_ij = c q_i.k_j - m (i - j); c is the softmax scale, m > 0 the head's slope. Leave out
the keys j <= J, J < i. With N = max |k_j| over the keys that i sees, and M the score of one key that is kept,

    left-out mass = sum_(j<=J) exp(s_ij) <= exp(|c| |q_i| N - m (i - J)) (1 + e^-m + e^-2m + ...)      (Cauchy-Schwarz)
    kept mass    >= exp(M)

The series has J + 1 terms, so it is at most G = min(J + 1, 1 / (1 - e^-m)). Hence, if

    |c| |q_i| N - m (i - J) + ln G <= M - ln(1 / eps)                                                            (*)

the left-out keys hold at most the share eps of the row's weights: the total variation between the full and the
truncated row is at most eps, and no component of the output moves by more than 2 eps max |v|. (*) asks for a distance
i - J of at least (|c| |q_i| N + ln G + ln(1 / eps) - M) / m, and the largest such distance of all queries is the head's
horizon. A far key of huge norm is in N, and pushes the horizon behind itself.

Norms and M are computed in floating point: each of |q_i|, N and M is off by less than head_dim * 2^-24, relative to
|q_i| N; NORM_MARGIN covers that three times over for head_dim <= MAX_HEAD_DIM_FP32, above which fp64 is used, and
NORM_FLOOR what is lost where squares underflow. Where m <= 0 or anything is NaN or infinite, nothing is left out.

Keys that are gone
------------------
A cache that has thrown away the keys j <= J cannot look at them again when a later query i comes. (*) does not ask for
it: of the left-out keys it needs the largest norm alone, which can be kept as a number. So (*) is not a hope about
queries to come but a check of each query that has come, with N = max_(j<=J) |k_j|, J and M = s_ii all at hand. Where it
holds, the row is within eps of the row over all keys; where it does not, the cache must be built again.

A vector r that is taken off all keys adds c q_i.r to a whole row of scores, which a softmax does not see. So (*) may be
used with k_j - r in place of k_j, in N and in M, for any r that stays the same from the first key on. With r near the
mean of the keys, what they have in common, such as a bias of the layer that makes them, is not in N.

What is needed of query i is its excess |c| |q_i| N - M, which is linear in N: ``excess_terms``. (*) then reads

    excess - m (i - J) + ln G <= ln eps,

whose left side, the logarithm of the largest share, is ``log_share_of_gone``; ``distance_to_keep`` solves it for i - J.
All of this is in fp64, where the error of each norm and product is below head_dim * 2^-53, and that of k_j - r 2^-53:
NORM_MARGIN covers them many times over. Here N is of the gone keys alone, and M may be of a longer one: its own error
has a margin of its own. The sums of these numbers and logarithms are rounded too, for which SUM_MARGIN is added to the
left side.

Others
------
Adaptive Computation Pruning of the Forgetting Transformer (arXiv:2504.06949) is a bound of this kind too, for a learned
decay of which ALiBi is the constant case, and its authors call it provably safe. With D_ij <= 0 the decay and U a bound
of |c q.k| over all pairs of a sequence, it leaves out the pairs with D_ij < -(2 U + ln S + ln(1 / eps)). (*) differs in
three terms:

- |c| |q_i| N, of this query and of the keys before it, stands where they have U, of the largest norms of the sequence;
- M, a score that was computed, stands where they have its lower bound -U;
- G, the sum of a geometric series, stands where they have S, the number of keys.

None is worse than theirs, so at one eps (*) keeps no pair that theirs leaves out, but for rounding. Theirs needs two
norms of a sequence and no score, and takes any decay. ``bench/pruning.py`` counts the pairs that each keeps.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries.
"""

from __future__ import annotations

import math

import torch

NORM_MARGIN = 1.0 + 2.0**-12
NORM_FLOOR = 2.0**-59  # sqrt(256) times the largest number whose fp32 square is not normal
SUM_MARGIN = 2.0**-30
MAX_HEAD_DIM_FP32 = 256


def find_horizons(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    slopes_H: torch.Tensor,
    *,
    softmax_scale: float,
    horizon_eps: float,
    query_offset: int,
) -> torch.Tensor:
    """Return for each head the largest distance i - j that a query of it needs, int64 [H]: of ``find_query_horizons``.

    Args:
        q_BSHK: Queries, at the positions ``query_offset``, ``query_offset + 1``, ...
        k_BSHK: Keys, at the positions 0, 1, ...
        slopes_H: Slope of each head.
        softmax_scale: Factor of q k^T.
        horizon_eps: Largest share of a row's weights that may be left out; 0 for none at all.
        query_offset: Position of the first query.
    """
    if horizon_eps == 0.0:
        return torch.full_like(slopes_H, query_offset + q_BSHK.shape[1] - 1, dtype=torch.int64)
    by_query_BQH = find_query_horizons(
        q_BSHK,
        k_BSHK,
        slopes_H,
        softmax_scale=softmax_scale,
        horizon_eps=horizon_eps,
        query_offset=query_offset,
    )
    return by_query_BQH.amax(dim=(0, 1))


def find_query_horizons(
    q_BSHK: torch.Tensor,
    k_BSHK: torch.Tensor,
    slopes_H: torch.Tensor,
    *,
    softmax_scale: float,
    horizon_eps: float,
    query_offset: int,
) -> torch.Tensor:
    """Return the distance i - j that each query needs, int64 [B, Q, H]; O(B S H K) work.

    Leaving out every key that is further away changes no row of attention weights by more than ``horizon_eps`` in total
    variation. Each query keeps its nearest key, which is itself or, beyond the last key, that one.

    Args:
        q_BSHK: Queries, at the positions ``query_offset``, ``query_offset + 1``, ...
        k_BSHK: Keys, at the positions 0, 1, ...
        slopes_H: Slope of each head.
        softmax_scale: Factor of q k^T.
        horizon_eps: Largest share of a row's weights that may be left out, above 0.
        query_offset: Position of the first query.
    """
    num_queries, num_keys = q_BSHK.shape[1], k_BSHK.shape[1]
    position_Q = torch.arange(query_offset, query_offset + num_queries, device=q_BSHK.device)
    nearest_Q = position_Q.clamp(max=num_keys - 1)
    in_order = query_offset == 0 and num_queries == num_keys

    compute_dtype = torch.float64 if q_BSHK.shape[-1] > MAX_HEAD_DIM_FP32 else torch.float32
    compute_dtype = torch.promote_types(q_BSHK.dtype, compute_dtype)
    q_BQHK, k_BSHK = q_BSHK.detach().to(compute_dtype), k_BSHK.detach().to(compute_dtype)
    nearest_k_BQHK = k_BSHK if in_order else k_BSHK[:, nearest_Q]
    kept_BQH = softmax_scale * torch.linalg.vecdot(q_BQHK, nearest_k_BQHK)
    norm_q_BQH = torch.linalg.vector_norm(q_BQHK, dim=-1) + NORM_FLOOR
    norm_k_BSH = (torch.linalg.vector_norm(k_BSHK, dim=-1) + NORM_FLOOR).cummax(dim=1).values
    bound_BQH = abs(softmax_scale) * NORM_MARGIN * norm_q_BQH * norm_k_BSH[:, nearest_Q]

    slopes_H = slopes_H.to(compute_dtype)
    slack_H = log_key_count(slopes_H, num_keys) + math.log(1.0 / horizon_eps)
    nearest_distance_Q1 = (position_Q - nearest_Q).to(compute_dtype)[:, None]
    distance_BQH = nearest_distance_Q1 + ((bound_BQH - kept_BQH + slack_H) / slopes_H).ceil()
    # Written so that NaN and the wrong side of infinity keep everything.
    is_proven_BQH = (slopes_H > 0) & (distance_BQH >= nearest_distance_Q1) & (distance_BQH < position_Q[:, None])
    return torch.where(is_proven_BQH, distance_BQH, position_Q[:, None]).to(torch.int64)


def log_key_count(slopes_H: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return ln G for each slope: the logarithm of the series 1 + e^-m + e^-2m + ... of at most ``num_keys`` terms."""
    of_all_terms_H = -torch.log(-torch.expm1(-slopes_H))
    at_most = math.log(num_keys)
    # A slope that is not positive has a series that does not fall: the comparison is false for its NaN and infinity.
    return torch.where(of_all_terms_H < at_most, of_all_terms_H, at_most)


def key_norms(k_SHK: torch.Tensor) -> torch.Tensor:
    """Return the norm of each key, fp64 [S, H], as (*) needs it: not below the true one by more than its margin."""
    return torch.linalg.vector_norm(k_SHK.detach().double(), dim=-1) + NORM_FLOOR


def excess_terms(
    q_QHK: torch.Tensor, own_k_QHK: torch.Tensor, *, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and b, fp64 [Q, H] each, with |c| |q_i| N - M <= a_i N + b_i for any N; M is the score of i's own key.

    Args:
        q_QHK: Queries.
        own_k_QHK: The key at the position of each query, less the vector r.
        softmax_scale: Factor of q k^T.
    """
    q_QHK, own_k_QHK = q_QHK.detach().double(), own_k_QHK.detach().double()
    of_norm_QH = abs(softmax_scale) * NORM_MARGIN * key_norms(q_QHK)
    own_margin_QH = (NORM_MARGIN - 1.0) * of_norm_QH * key_norms(own_k_QHK)
    return of_norm_QH, own_margin_QH - softmax_scale * torch.linalg.vecdot(q_QHK, own_k_QHK)


def log_share_of_gone(
    excess_QH: torch.Tensor, gone_H: torch.Tensor, slopes_H: torch.Tensor, *, first_query: int
) -> torch.Tensor:
    """Return an upper bound of the logarithm of the share of a query's weights that gone keys hold, fp64 [H].

    Args:
        excess_QH: |c| |q_i| N - M of each query, N the largest norm of the keys that are gone.
        gone_H: How many keys of each head are gone: those at the positions 0, 1, ..., gone - 1.
        slopes_H: Slope of each head; where it is not above 0 the result is infinite if a key is gone.
        first_query: Position of the first query; the others follow it.

    Returns:
        Minus infinity where nothing is gone, and NaN where the excess is.
    """
    slopes_H = slopes_H.double()
    position_Q1 = torch.arange(first_query, first_query + len(excess_QH), device=excess_QH.device)[:, None]
    distance_QH = position_Q1 - gone_H + 1
    share_H = (excess_QH - slopes_H * distance_QH).amax(dim=0) + log_key_count(slopes_H, max(1, first_query))
    share_H = torch.where(slopes_H > 0, share_H + SUM_MARGIN, torch.inf)
    return torch.where(gone_H > 0, share_H, -torch.inf)


def distance_to_keep(
    excess_H: torch.Tensor, slopes_H: torch.Tensor, *, num_keys: int, horizon_eps: float
) -> torch.Tensor:
    """Return the smallest distance from a query at which keys may be gone, int64 [H]; ``num_keys`` if there is none.

    Args:
        excess_H: The largest excess of a head's queries.
        slopes_H: Slope of each head.
        num_keys: Number of keys up to the query.
        horizon_eps: Largest share of a row's weights that may be gone, above 0.
    """
    slopes_H = slopes_H.double()
    slack_H = log_key_count(slopes_H, max(1, num_keys)) - math.log(horizon_eps) + SUM_MARGIN
    distance_H = ((excess_H + slack_H) / slopes_H).ceil()
    is_proven_H = (slopes_H > 0) & (distance_H >= 1) & (distance_H < num_keys)
    return torch.where(is_proven_H, distance_H, num_keys).to(torch.int64)

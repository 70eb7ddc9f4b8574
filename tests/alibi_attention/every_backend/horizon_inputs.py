"""Inputs that come close to breaking the horizon's promise, and what a kernel's horizon leaves out of them.

The measure is exact: a row's weights in fp64, summed over the keys that the kernel did not visit. It has no part in the
rounding of the kernel's output, so that the promise is held to its last digits.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from alibi_attention.bench.contract import exact_rows

FP64_SUM_ERROR = 1e-12  # of the brute-force sums; the theorem itself has no tolerance


class Call(NamedTuple):
    """What a horizon is found for."""

    q: torch.Tensor
    k: torch.Tensor
    slopes: torch.Tensor
    eps: float
    softmax_scale: float = 0.25
    query_offset: int = 0


def largest_loss(call: Call, first_keys_BHQ: torch.Tensor) -> tuple[float, bool]:
    """Return the largest share of a row's weights before its first key, and whether each row has a key left."""
    q, k = (x.double().transpose(1, 2) for x in (call.q, call.k))
    scale_in_q = call.softmax_scale * q.shape[-1] ** 0.5  # exact_rows scales by head_dim^-0.5
    weights = exact_rows(q * scale_in_q, k, call.slopes, call.query_offset)
    key = torch.arange(k.shape[2])
    position = call.query_offset + torch.arange(q.shape[2])
    is_lost = key < first_keys_BHQ[..., None]
    has_kept = ((key <= position[:, None]) & ~is_lost).any(-1).all().item()
    return (weights * is_lost).sum(-1).max().item(), has_kept


def aligned(length):
    """Every key is parallel to every query: the inequality of Cauchy and Schwarz is an equation."""
    direction = torch.randn(16).div(4).expand(1, length, 4, 16)
    return 3 * direction, direction * torch.linspace(5, 1, length)[:, None, None]


def opposed(length):
    q = torch.randn(1, length, 4, 16)
    return q, -q


def far_key(length):
    q, k = torch.randn(2, 1, length, 4, 16)
    k[:, 0] *= 1e4
    return q, k


INPUTS = {
    "random": lambda length: torch.randn(2, 2, length, 4, 16).unbind(),
    "aligned": aligned,
    "opposed": opposed,
    "far_key": far_key,
    "zero_q": lambda length: (torch.zeros(1, length, 4, 16), torch.randn(1, length, 4, 16)),
    "zero_k": lambda length: (torch.randn(1, length, 4, 16), torch.zeros(1, length, 4, 16)),
}
SLOPES = torch.tensor([1.0, 0.5, 0.1, 0.02])

# Of the inputs below: one query, which stands at the last key, the first of its block; or far beyond it.
NUM_KEYS = 641
EPS = 2.0**-24


def solve_slope(excess: float, distance: int, advantage: float = 0.0) -> float:
    """Return the slope at which far keys hold the share EPS * e^excess of a row.

    They are all keys at ``distance`` or more, and each scores ``advantage`` more than the nearest key, but for the
    bias. The keys between have no weight.
    """
    slope, num_far = 0.1, NUM_KEYS - distance
    for _ in range(100):
        series = math.log(-math.expm1(-slope * num_far) / -math.expm1(-slope))
        slope = (advantage + series - math.log(EPS) - excess) / distance
    return slope


def tight(excess: float, distance: int, product: float, num_heads: int = 24) -> Call:
    """Far keys hold EPS * e^excess, and every inequality of the proof but the last is an equation.

    All of them, and the nearest key, are the query itself, whose product with itself is ``product`` to 4 times that;
    the keys between are 0. At a large product the rounding of norms and scores, which is relative to it, decides.
    """
    q = torch.nn.functional.normalize(torch.randn(num_heads, 64), dim=-1) * product**0.5
    q *= 1 + torch.rand(num_heads, 1)
    k = torch.zeros(1, NUM_KEYS, num_heads, 64)
    k[:, : NUM_KEYS - distance] = k[:, -1] = q
    slopes = torch.full((num_heads,), solve_slope(excess, distance))
    return Call(q[None, None], k, slopes, EPS, softmax_scale=1.0, query_offset=NUM_KEYS - 1)


def beyond_the_keys(excess: float, distance: int) -> Call:
    """A query nearly 2^24 positions past the last key, whose bias of a million or more is rounded; far keys are 0."""
    num_heads = 8
    q, k = torch.zeros(1, 1, num_heads, 16), torch.zeros(1, NUM_KEYS, num_heads, 16)
    q[..., 0], k[:, NUM_KEYS - distance : -1, :, 0] = 1.0, -60.0
    slopes = [solve_slope(excess * (1 + head / num_heads), distance) for head in range(num_heads)]
    return Call(q, k, torch.tensor(slopes), EPS, softmax_scale=1.0, query_offset=2**24 - 2 * NUM_KEYS)


def lossy_sums(excess: float, distance: int) -> Call:
    """``tight``, with norms that NumPy, and so Triton's interpreter, computes as badly as can be.

    It adds 128 squares up in eight sums: each starts a little above 1 here and loses what comes next, just under 2^-24.
    Of many such vectors those are taken whose computed norm is furthest from the true one, 9 * 2^-24 of it. The nearest
    key has only one component: its score is not summed.
    """
    num_heads, product = 4, 2.0**22
    q_NK = torch.full((2000, 128), 2.0**-12 * (1 - 2.0**-12))
    q_NK[:, :8] = 1 + 0.002 * torch.rand(2000, 8)
    q_NK *= (product / 8) ** 0.5
    computed_N = torch.from_numpy(np.sqrt((q_NK.numpy() ** 2).sum(1))).double()
    true_N = q_NK.double().norm(dim=1)
    q = q_NK[(computed_N / true_N).argsort()[:num_heads]]
    k = torch.zeros(1, NUM_KEYS, num_heads, 128)
    k[:, : NUM_KEYS - distance] = q
    k[0, -1, :, 0] = (q.double().square().sum(1) / q[:, 0].double()).float()
    advantage_H = (q.double() ** 2).sum(1) - q[:, 0].double() * k[0, -1, :, 0].double()
    slopes = [solve_slope(excess, distance, advantage) for advantage in advantage_H.tolist()]
    return Call(q[None, None], k, torch.tensor(slopes), EPS, softmax_scale=1.0, query_offset=NUM_KEYS - 1)


def underflowing_queries() -> Call:
    """A processor that flushes small numbers to zero computes |q| = 0 here, and q.k is 14.4."""
    q, k = torch.full((1, 400, 1, 256), 2.0**-64), torch.zeros(1, 400, 1, 256)
    k[:, 60] = 1.8 * 2.0**59
    return Call(q, k, torch.tensor([0.1]), 1e-3, softmax_scale=1.0)


def underflowing_keys() -> Call:
    """The same processor computes |k|^2 = 2^-117 here, and it is half as much again; q.k is 24."""
    k = torch.full((1, NUM_KEYS, 1, 256), 2.0**-63 * (1 - 2.0**-10))
    k[..., 0] = 2.0**-58.5
    q = k[:, :1] * 2.0**121
    slopes = torch.tensor([solve_slope(0.5, 321)])
    k[:, NUM_KEYS - 321 : -1] = 0
    return Call(q, k, slopes, EPS, softmax_scale=1.0, query_offset=NUM_KEYS - 1)

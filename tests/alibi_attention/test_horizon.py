from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_attention import alibi_slopes
from alibi_attention.contract import exact_rows
from alibi_attention.horizon import MAX_HEAD_DIM_FP32, find_horizons, log_key_count

FP64_SUM_ERROR = 1e-12  # of the brute-force sums; the theorem itself has no tolerance


def largest_loss(q, k, slopes, horizons, softmax_scale, query_offset):
    """The largest share of a row's weights, in fp64, that lies past its head's horizon; and whether a row is empty."""
    scale_in_q = softmax_scale * q.shape[-1] ** 0.5  # exact_rows scales by head_dim^-0.5
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    weights = exact_rows(q * scale_in_q, k, slopes, query_offset)
    distance = query_offset + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    is_lost = distance > horizons[:, None, None]
    has_kept = ((distance >= 0) & ~is_lost).any(-1).all()
    return (weights * is_lost).sum(-1).max().item(), has_kept


def assert_promise(q, k, slopes, *, eps, softmax_scale=0.25, query_offset=0):
    horizons = find_horizons(q, k, slopes, softmax_scale=softmax_scale, horizon_eps=eps, query_offset=query_offset)
    loss, has_kept = largest_loss(q, k, slopes, horizons, softmax_scale, query_offset)
    assert loss <= eps + FP64_SUM_ERROR
    assert has_kept
    return horizons


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


@pytest.mark.parametrize("eps", [2.0**-24, 1e-3, 0.5])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_row_loses_more_than_eps(inputs, eps, dtype):
    q, k = (x.to(dtype) for x in INPUTS[inputs](600))
    assert_promise(q, k, SLOPES, eps=eps)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    query_offset=st.integers(0, 200),
    head_dim=st.sampled_from([1, 3, 64, MAX_HEAD_DIM_FP32 + 1]),
    slope=st.floats(2.0**-8, 4.0, width=32),
    norm=st.floats(0.0, 30.0),
    softmax_scale=st.floats(-2.0, 2.0),
    eps=st.sampled_from([2.0**-24, 1e-3, 0.5]),
)
def test_no_row_loses_more_than_eps_wherever_queries_stand(
    queries, keys, query_offset, head_dim, slope, norm, softmax_scale, eps
):
    q = norm * torch.randn(2, queries, 1, head_dim) / head_dim**0.5
    k = torch.randn(2, keys, 1, head_dim)
    slopes = torch.tensor([slope])
    horizons = assert_promise(q, k, slopes, eps=eps, softmax_scale=softmax_scale, query_offset=query_offset)
    assert horizons.max() <= query_offset + queries - 1


def test_steep_heads_see_no_further_than_their_slope_lets_them():
    q, k = torch.randn(2, 1, 4096, 8, 64)
    horizons = find_horizons(q, k, alibi_slopes(8), softmax_scale=0.125, horizon_eps=2.0**-24, query_offset=0)
    assert (horizons[:5] * alibi_slopes(8)[:5] < 50).all()
    assert horizons[7] == 4095


def test_without_scores_the_horizon_is_the_biass_own():
    q, k = torch.zeros(2, 1, 4096, 8, 64)
    eps = 2.0**-24
    horizons = find_horizons(q, k, alibi_slopes(8), softmax_scale=0.125, horizon_eps=eps, query_offset=0)
    for slope, horizon in zip(alibi_slopes(8).tolist(), horizons.tolist(), strict=True):
        of_bias = (math.log(1 / eps) - math.log(1 - math.exp(-slope))) / slope
        assert min(4095, of_bias) <= horizon <= min(4095, of_bias + 2)


def test_a_far_key_of_huge_norm_is_within_the_horizon():
    q, k = far_key(600)
    horizons = find_horizons(q, k, SLOPES, softmax_scale=0.25, horizon_eps=1e-3, query_offset=0)
    assert (horizons == 599).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k"])
def test_what_is_not_finite_is_never_left_out(value, which):
    q, k = torch.randn(2, 1, 600, 4, 16)
    {"q": q[:, -1], "k": k[:, 3]}[which][0, 1, 5] = value
    horizons = find_horizons(q, k, SLOPES, softmax_scale=0.25, horizon_eps=1e-3, query_offset=0)
    assert horizons[1] == 599
    assert (horizons[:1] < 100).all()


def test_the_promise_is_tight_where_the_inequalities_are_equations():
    """All far keys point at the query, near ones score next to nothing against its own."""
    eps, slopes = 0.01, torch.tensor([0.02])
    direction = torch.randn(16) / 4
    q, k = 5 * direction.expand(1, 1, 1, 16), torch.zeros(1, 1000, 1, 16)
    k[:, :572] = k[:, -1] = 15 * direction / direction.square().sum()
    horizons = assert_promise(q, k, slopes, eps=eps, softmax_scale=0.2, query_offset=999)
    assert horizons.item() in (427, 428)  # one key more than needed at most: 572 is the first that is kept, or 571
    loss, _ = largest_loss(q, k, slopes, horizons, 0.2, 999)
    assert loss > 0.9 * eps


def test_slopes_that_do_not_fall_and_eps_0_leave_nothing_out():
    q, k = torch.randn(2, 1, 300, 4, 16)
    slopes = torch.tensor([0.0, -100.0, torch.nan, 1.0])
    horizons = find_horizons(q, k, slopes, softmax_scale=0.25, horizon_eps=0.5, query_offset=7)
    assert horizons.tolist()[:3] == [306] * 3
    assert horizons[3] < 100
    nothing = find_horizons(q, k, slopes, softmax_scale=0.25, horizon_eps=0.0, query_offset=7)
    assert nothing.tolist() == [306] * 4


def test_squares_that_underflow_hide_no_key():
    """A processor that flushes small numbers to zero computes |q| = 0 here, and q.k is 8."""
    q = torch.full((1, 200, 1, 256), 2.0**-64)
    k = torch.zeros(1, 200, 1, 256)
    k[:, 150] = 2.0**59
    assert torch.set_flush_denormal(True)
    try:
        assert torch.linalg.vector_norm(q[0, 0, 0]) == 0
        horizons = find_horizons(q, k, torch.tensor([0.5]), softmax_scale=1.0, horizon_eps=1e-3, query_offset=0)
    finally:
        torch.set_flush_denormal(False)
    loss, _ = largest_loss(q, k, torch.tensor([0.5]), horizons, 1.0, 0)
    assert loss <= 1e-3


@pytest.mark.parametrize("num_keys", [1, 2, 50, 100_000])
def test_log_key_count_is_at_least_the_series(num_keys):
    slopes = torch.tensor([2.0, 0.5, 2.0**-8, 2.0**-20, 0.0, -0.5, torch.nan], dtype=torch.float64)
    counts = log_key_count(slopes, num_keys).exp()
    falling = slopes[:4]
    series = torch.exp(-falling[:, None] * torch.arange(num_keys)).sum(-1)
    infinite_series = 1 / (1 - torch.exp(-falling))
    torch.testing.assert_close(counts[:4], infinite_series.clamp(max=num_keys))
    assert (counts[:4] >= series * (1 - FP64_SUM_ERROR)).all()
    torch.testing.assert_close(counts[4:], torch.full((3,), float(num_keys), dtype=torch.float64))

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_attention import alibi_slopes
from alibi_attention.horizon import (
    MAX_HEAD_DIM_FP32,
    distance_to_keep,
    excess_terms,
    find_horizons,
    key_norms,
    log_key_count,
    log_share_of_gone,
)
from tests.alibi_attention.every_backend.horizon_inputs import (
    FP64_SUM_ERROR,
    INPUTS,
    SLOPES,
    Call,
    far_key,
    largest_loss,
)


def assert_promise(q, k, slopes, *, eps, softmax_scale=0.25, query_offset=0):
    horizons = find_horizons(q, k, slopes, softmax_scale=softmax_scale, horizon_eps=eps, query_offset=query_offset)
    loss, has_kept = loss_past(horizons, Call(q, k, slopes, eps, softmax_scale, query_offset))
    assert loss <= eps + FP64_SUM_ERROR
    assert has_kept
    return horizons


def loss_past(horizons_H, call):
    position_Q = call.query_offset + torch.arange(call.q.shape[1])
    return largest_loss(call, (position_Q - horizons_H[:, None]).expand(call.q.shape[0], -1, -1))


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


def test_slopes_that_do_not_fall_and_eps_0_leave_nothing_out():
    q, k = torch.randn(2, 1, 300, 4, 16)
    slopes = torch.tensor([0.0, -100.0, torch.nan, 1.0])
    horizons = find_horizons(q, k, slopes, softmax_scale=0.25, horizon_eps=0.5, query_offset=7)
    assert horizons.tolist()[:3] == [306] * 3
    assert horizons[3] < 100
    nothing = find_horizons(q, k, slopes, softmax_scale=0.25, horizon_eps=0.0, query_offset=7)
    assert nothing.tolist() == [306] * 4


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


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_the_share_of_keys_that_are_gone_is_never_underrated(spread):
    """Against the equation in fp64: queries 300, 301, ..., of which the first keys are gone, as many as a head says."""
    generator = torch.Generator().manual_seed(0)
    q, k = (spread * torch.randn(320, 4, 16, generator=generator) for _ in "qk")
    k[17] *= 3.0
    centre = k.double().mean(dim=0)
    slopes, gone = torch.tensor([0.5, 0.1, 0.01, 0.0]), torch.tensor([280, 250, 20, 1])
    q = q[300:]
    of_norm, rest = excess_terms(q, k[300:] - centre, softmax_scale=0.25)
    norm = torch.stack([key_norms(k[:n] - centre)[:, head].max() for head, n in enumerate(gone.tolist())])
    bound = log_share_of_gone(of_norm * norm + rest, gone, slopes, first_query=300)
    distance = 300 + torch.arange(20)[:, None] - torch.arange(320)
    scores = 0.25 * torch.einsum("qhk,thk->hqt", q.double(), k.double()) - slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -torch.inf).log_softmax(-1)
    for head, n in enumerate(gone.tolist()):
        assert float(weights[head, :, :n].logsumexp(-1).max()) <= float(bound[head])
    assert torch.equal(
        log_share_of_gone(of_norm * norm + rest, 0 * gone, slopes, first_query=300), 0 * norm - torch.inf
    )
    # The distance that is asked for is just enough: with one key more gone, the bound would be above eps.
    excess = (of_norm * norm + rest)[:1]
    keep = distance_to_keep(excess[0], slopes, num_keys=10**6, horizon_eps=2.0**-11)
    assert keep[3] == 10**6  # a slope of 0 proves nothing
    for more, is_proven in ((0, True), (1, False)):
        share = log_share_of_gone(excess, 10**6 - keep + 1 + more, slopes, first_query=10**6)
        assert ((share <= math.log(2.0**-11)) == is_proven)[:3].all()

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_attention import alibi_slopes
from alibi_attention.horizon import MAX_HEAD_DIM_FP32, find_horizons, log_key_count
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

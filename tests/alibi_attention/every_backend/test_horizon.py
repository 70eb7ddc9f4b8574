"""The horizon leaves out no more than it promises, and never what is no number."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from alibi_attention import attention
from tests.alibi_attention.every_backend.support import (
    BOUNDS,
    ERROR_FACTOR_16_BIT,
    HEAD_DIM,
    HERE,
    attend_ref,
    best_dtype,
    every_backend,
    pick,
    plain_sdpa,
    randn,
    slopes_of,
)
from tests.support.device import DEVICE, ON_GPU

gpu = pytest.mark.gpu  # named in each file: by it a GPU's run finds them

HORIZON_ROUNDING = 4e-6  # times max |v|: what fp32 itself may move an output by, beside the horizon's promise


def far_key(length):
    """The first key is huge and every query points at it: all of them attend to it, however steep the slope."""
    q, k, v = randn(3, 1, length, 4, HEAD_DIM)
    direction = F.normalize(randn(HEAD_DIM), dim=0)
    k[:, 0] = 40 * length * direction
    return q + 4 * direction, k, v


def growing_keys(length):
    """Norms that rise towards the past, so that they and the slopes pull against each other."""
    q, k, v = randn(3, 1, length, 4, HEAD_DIM)
    return q, k * torch.linspace(8, 1, length, device=DEVICE)[:, None, None], v


def opposed_keys(length):
    """Every query is opposed to its own key: what is kept for sure scores low."""
    q, k, v = randn(3, 1, length, 4, HEAD_DIM)
    return q, k - 2 * q, v


def zero_queries(length):
    """The bias decides alone."""
    q, k, v = randn(3, 1, length, 4, HEAD_DIM)
    return 0 * q, k, v


ADVERSARIES = [lambda length: randn(3, 1, length, 4, HEAD_DIM), far_key, growing_keys, opposed_keys, zero_queries]
HORIZON_SLOPES = torch.tensor([0.84, 0.5, 0.1, 2.0**-8])
# On a GPU folded sees every key, whatever horizon it is given.
WITH_HORIZON = [backend for backend in HERE if backend.horizon and not (ON_GPU and backend.name == "folded")]


@gpu
@pytest.mark.parametrize("horizon_eps", [2.0**-24, 1e-3, 0.0])
@pytest.mark.parametrize("make", ADVERSARIES, ids=["random", *(make.__name__ for make in ADVERSARIES[1:])])
@pytest.mark.parametrize("backend", WITH_HORIZON, ids=lambda backend: backend.name)
def test_the_horizon_moves_no_output_by_more_than_it_promises(backend, make, horizon_eps):
    q, k, v = make(pick(backend, 1500, 150))
    slopes = HORIZON_SLOPES.to(DEVICE)
    exact = attend_ref(q.double(), k.double(), v.double(), alibi_slopes=slopes)
    output = attention(q, k, v, alibi_slopes=slopes, horizon_eps=horizon_eps, backend=backend.name)
    assert (output - exact).abs().max() <= (2 * horizon_eps + HORIZON_ROUNDING) * v.abs().max()


def test_the_far_key_is_what_the_queries_attend_to():
    q, k, v = (x.double() for x in far_key(1500))
    exact = attend_ref(q, k, v, alibi_slopes=HORIZON_SLOPES)
    assert ((exact - v[:, :1]).abs().amax((0, 2, 3)) < 1e-6).double().mean() > 0.9


@gpu
@every_backend
def test_one_far_key_of_huge_norm_is_found_in_every_gradient(make_inputs, forward_backward, relative_errors, backend):
    """Allowed are two roundings of the largest score, one when it is computed and one of the log-sum-exp that a
    backward pass subtracts (scores of 16-bit inputs are fp32), and what plain attention makes of the same q and k."""
    dtype, slopes = best_dtype(backend), slopes_of(2)
    inputs = q, k, _, _ = make_inputs(1, pick(backend, 768, 150), 2, HEAD_DIM, dtype=dtype)
    k[:, 3] *= 12.0
    q[:, -5:] = k[:, 3:4] / 4
    results = forward_backward(partial(attention, alibi_slopes=slopes, backend=backend.name), inputs)
    exact = forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64)
    plain_exact = forward_backward(partial(attend_ref, alibi_slopes=None), inputs, torch.float64)
    plain_errors = relative_errors(forward_backward(plain_sdpa, inputs), plain_exact)
    largest_score = torch.einsum("bihk,bhk->bih", q.float(), k[:, 3].float()).max().item() * HEAD_DIM**-0.5
    assert 100 < largest_score < 1000
    two_roundings = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * largest_score
    for error, plain_error in zip(relative_errors(results, exact), plain_errors, strict=True):
        assert error < max(BOUNDS[dtype], two_roundings, ERROR_FACTOR_16_BIT * plain_error)
    blind = forward_backward(partial(attend_ref, alibi_slopes=slopes), [x[:, 4:] for x in inputs], torch.float64)
    assert min(relative_errors([x[:, -5:] for x in blind], [x[:, -5:] for x in exact])[:2]) > 0.1  # it matters


@gpu
@every_backend
def test_not_a_number_in_a_key_is_never_hidden(backend):
    dtype = best_dtype(backend)
    q, k, v = randn(3, 1, pick(backend, 1500, 150), 2, HEAD_DIM).to(dtype)
    k[:, 3, 0, 5] = torch.nan
    output = attention(q, k, v, alibi_slopes=torch.tensor([0.84, 0.5], device=DEVICE), backend=backend.name)
    assert output[:, 3:, 0].isnan().all()
    assert not output[:, :, 1].isnan().any()

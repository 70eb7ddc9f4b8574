"""Output and gradients of every back end, against the equation in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import attention
from tests.alibi_attention.every_backend.support import (
    BOUNDS,
    DTYPES,
    ERROR_FACTOR_16_BIT,
    HEAD_DIM,
    HERE,
    INTERPRETED,
    attend_ref,
    best_dtype,
    every_backend,
    every_backend_and_dtype,
    pick,
    plain_sdpa,
    randn,
    slopes_of,
)
from tests.support.device import DEVICE, ON_GPU

gpu = pytest.mark.gpu  # named in each file: by it a GPU's run finds them

ERROR_FACTOR_UNFUSED = 3.0  # its scores are rounded to the type of q, as the paper's code did; 2.7 was seen
HEAD_DIMS = (96, 128, 256) if ON_GPU else (80,)
PROMISES_BITS = ("native", "triton", "reference")  # flash-attn and PyTorch add in any order unless they are told not to


def max_errors(results, exact):
    return [(x - y).abs().max().item() for x, y in zip(results, exact, strict=True)]


@gpu
@pytest.mark.parametrize(("length", "num_heads"), [(1, 12), (97, 12), (97, 20), (1025, 5)])
@every_backend_and_dtype
def test_odd_lengths_and_head_counts(make_inputs, check, backend, dtype, length, num_heads):
    if backend.name in INTERPRETED:
        length, num_heads = {1025: 131}.get(length, length), {12: 3, 20: 5, 5: 1}[num_heads]
    check(backend, make_inputs(1, length, num_heads, HEAD_DIM, dtype=dtype), alibi_slopes=slopes_of(num_heads))


@gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "length"),
    [
        pytest.param(backend, dtype, length, id=f"{backend.name}-{str(dtype).removeprefix('torch.')}-{length}")
        for backend in HERE
        for dtype in (torch.bfloat16, torch.float16)
        if dtype in DTYPES
        for length in pick(backend, (97, 1025), (97,))
        if dtype in backend.dtypes
    ],
)
def test_16_bit_error_is_at_most_twice_that_of_plain_sdpa(make_inputs, forward_backward, backend, dtype, length):
    num_heads = pick(backend, 5, 2)
    slopes = slopes_of(num_heads)
    inputs = make_inputs(1, length, num_heads, 64, dtype=dtype)
    results = forward_backward(partial(attention, backend=backend.name, alibi_slopes=slopes), inputs)
    errors = max_errors(results, forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64))
    plain_exact = forward_backward(partial(attend_ref, alibi_slopes=None), inputs, torch.float64)
    plain_errors = max_errors(forward_backward(plain_sdpa, inputs), plain_exact)
    for name, error, plain_error in zip(("output", "dq", "dk", "dv"), errors, plain_errors, strict=True):
        factor = ERROR_FACTOR_UNFUSED if backend.name == "unfused" else ERROR_FACTOR_16_BIT
        assert error <= factor * plain_error, f"{name}: {error} against {plain_error}"


@gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_backend
def test_large_head_dims(make_inputs, check, backend, head_dim):
    inputs = make_inputs(2, pick(backend, 400, 70), 3, head_dim, dtype=best_dtype(backend))
    check(backend, inputs, alibi_slopes=slopes_of(3))


@gpu
@pytest.mark.parametrize(
    "backend", [backend for backend in HERE if backend.name in PROMISES_BITS], ids=lambda backend: backend.name
)
def test_the_same_call_gives_the_same_bits(make_inputs, forward_backward, backend):
    batch, length, num_heads = pick(backend, (2, 515, 4), (1, 131, 2))
    inputs = make_inputs(batch, length, num_heads, HEAD_DIM, dtype=best_dtype(backend))
    attend = partial(attention, alibi_slopes=slopes_of(num_heads), backend=backend.name)
    first, second = (forward_backward(attend, inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every_backend
def test_any_shape(forward_backward, relative_errors, backend):
    from hypothesis import given, settings  # not at the top: where a GPU is it may be missing
    from hypothesis import strategies as st

    dtype = best_dtype(backend)

    @settings(max_examples=pick(backend, 25, 6), deadline=None, derandomize=True)
    @given(
        batch=st.integers(1, 3),
        queries=st.integers(1, 40),
        cached=st.integers(0, 40),
        num_heads=st.integers(1, pick(backend, 7, 2)),
        head_dim=st.integers(1, 33),
        with_slopes=st.booleans(),
    )
    def check_shape(batch, queries, cached, num_heads, head_dim, with_slopes):
        q, upstream = randn(2, batch, queries, num_heads, head_dim).to(dtype)
        k, v = randn(2, batch, cached + queries, num_heads, head_dim).to(dtype)
        slopes = slopes_of(num_heads) if with_slopes else None
        attend = partial(attention, alibi_slopes=slopes, backend=backend.name)
        results = forward_backward(attend, (q, k, v, upstream))
        exact = forward_backward(partial(attend_ref, alibi_slopes=slopes), (q, k, v, upstream), torch.float64)
        assert max(relative_errors(results, exact)) < BOUNDS[dtype]

    check_shape()


@pytest.mark.parametrize(
    "view",
    ["head_dim_outermost", pytest.param("packed_qkv", marks=gpu), "every_second_channel", "transposed_batch"],
)
@every_backend
def test_strided_inputs(forward_backward, relative_errors, backend, view):
    length, dtype = pick(backend, 300, 60), best_dtype(backend)
    packed = randn(2, length, 3, 3, HEAD_DIM)  # as the model passes it
    q, k, v = {
        "head_dim_outermost": lambda: randn(3, 16, 2, length, 3).to(dtype).permute(0, 2, 3, 4, 1),
        "packed_qkv": lambda: packed.to(dtype).unbind(2),
        "every_second_channel": lambda: randn(3, 2, length, 3, 32).to(dtype)[..., ::2],
        "transposed_batch": lambda: randn(3, length, 2, 3, 16).to(dtype).transpose(1, 2),
    }[view]()
    assert not q.is_contiguous()
    attend = partial(attention, alibi_slopes=slopes_of(3), backend=backend.name)
    # The upstream gradient of a sum: one number, all strides 0.
    upstream = torch.ones((), dtype=dtype, device=DEVICE).expand_as(q)
    results = forward_backward(attend, (q, k, v, upstream))
    exact = forward_backward(partial(attend_ref, alibi_slopes=slopes_of(3)), (q, k, v, upstream), torch.float64)
    # With this upstream gradient dq and dk are small differences of sums: the output's size is their scale.
    assert max(relative_errors(results, exact)) < BOUNDS[dtype]


@gpu
@every_backend
def test_slopes_of_any_sign(make_inputs, check, backend):
    inputs = make_inputs(1, pick(backend, 300, 90), 4, HEAD_DIM, dtype=best_dtype(backend))
    check(backend, inputs, alibi_slopes=torch.tensor([-0.05, 0.0, 0.5, 2.0], device=DEVICE))

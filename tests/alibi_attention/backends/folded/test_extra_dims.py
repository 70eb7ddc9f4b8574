from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import alibi_slopes, attention
from alibi_attention.backends.folded import extra_dims
from alibi_attention.bench.contract import exact_rows, measured_rows

FP64_BOUND = 1e-13  # ||x - x64|| / ||x64||
# m j of the extra dimensions is summed in fp32: numbers up to m S / 2, spaced by 2^-17 at 64 and 2^-14 at 512.
FP32_ERROR_EXTRA_DIMS = 1e-4
ERROR_FACTOR_16_BIT = 2.0  # times the error of plain SDPA in the same type
TOTAL_VARIATION_EXACT = 1e-3
attend_ref = partial(attention, backend="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def attend_with_extra_dims(q, k, v, *, alibi_slopes, softmax_scale=None, query_offset=0):
    """What a GPU computes, here on PyTorch's CPU kernels."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return extra_dims.attend_with_extra_dims(q, k, v, alibi_slopes, scale, query_offset)


def largest_errors(results, exact):
    return [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(results, exact, strict=True)]


@pytest.mark.parametrize("num_keys", [1, 97, 16384, 2**17, 2**17 + 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax_scale", [0.125, 64**-0.5 / 3, 1.0])
def test_the_pieces_are_the_bias(num_keys, dtype, softmax_scale):
    slopes = torch.tensor([0.5, 2.0**-8, 2.0**-0.5, 2.0**-7.5])
    slope_pieces, position_pieces = extra_dims.fold(slopes, softmax_scale, num_keys, dtype)
    assert slope_pieces.dtype == position_pieces.dtype == dtype
    products = slope_pieces.double() * position_pieces.double()
    if dtype != torch.float64:  # which is summed in fp64
        assert torch.equal(products, products.float().double())
    bias = softmax_scale * products.sum(-1)
    exact = slopes.double() * (torch.arange(num_keys, dtype=torch.float64) - num_keys // 2)[:, None]
    assert ((bias - exact).abs() <= 2.0**-24 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extra_dims_round_no_bias_to_16_bits(make_inputs, dtype):
    q, k, _, _ = make_inputs(1, 16, 8, 64, keys=2048, dtype=dtype)
    rows = measured_rows(partial(attend_with_extra_dims, alibi_slopes=alibi_slopes(8), query_offset=2032), q, k)
    exact = exact_rows(*(x.double().transpose(1, 2) for x in (q, k)), alibi_slopes(8), 2032)[0]
    assert ((rows.double() - exact).abs().sum(-1) / 2).mean() < TOTAL_VARIATION_EXACT


@pytest.mark.parametrize(
    ("queries", "keys", "query_offset"), [(1025, 1025, 0), (300, 700, 400), (300, 500, 350), (5, 9, 20)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_dims_against_fp64(make_inputs, forward_backward, dtype, queries, keys, query_offset):
    inputs = make_inputs(2, queries, 5, 64, keys=keys, dtype=dtype)
    arguments = {"alibi_slopes": alibi_slopes(5), "query_offset": query_offset}
    results = forward_backward(partial(attend_with_extra_dims, **arguments), inputs)
    errors = largest_errors(results, forward_backward(partial(attend_ref, **arguments), inputs, torch.float64))
    plain = {"alibi_slopes": None, "query_offset": query_offset}
    plain_results = forward_backward(partial(attention, backend="sdpa", **plain), inputs)
    exact = forward_backward(partial(attend_ref, **plain), inputs, torch.float64)
    bounds = {torch.float32: [FP32_ERROR_EXTRA_DIMS] * 4, torch.float64: [100 * FP64_BOUND] * 4}.get(
        dtype, [ERROR_FACTOR_16_BIT * error for error in largest_errors(plain_results, exact)]
    )
    for name, error, bound in zip(("output", "dq", "dk", "dv"), errors, bounds, strict=True):
        assert error <= bound, name

"""The bias is that of each head's own slope, in fp32, and no scale multiplies it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import attention, local_slopes
from alibi_attention.bench.contract import exact_rows, measured_rows
from tests.alibi_attention.every_backend.support import (
    BOUNDS,
    HEAD_DIM,
    HERE,
    best_dtype,
    every_backend,
    every_backend_and_dtype,
    pick,
    skipping_what_its_build_lacks,
    slopes_of,
)
from tests.support.device import DEVICE

gpu = pytest.mark.gpu  # named in each file: by it a GPU's run finds them

TOTAL_VARIATION_EXACT = 1e-3
TOTAL_VARIATION_UNFUSED_BF16 = 1.2e-3  # its scores are rounded to the type of q
TOTAL_VARIATION_OF_BF16_BIAS = 0.05


@pytest.mark.parametrize(
    ("backend", "num_heads", "tensor_parallel_size"),
    [
        pytest.param(backend, num_heads, size, id=f"{backend.name}-{num_heads}-{size}")
        for backend in HERE
        for num_heads, size in pick(backend, ((12, 2), (12, 4), (20, 2), (20, 4)), ((12, 2), (20, 4)))
    ],
)
def test_trap_2_shards_of_the_heads_are_the_whole(
    make_inputs, forward_backward, relative_errors, backend, num_heads, tensor_parallel_size
):
    inputs = make_inputs(1, pick(backend, 200, 33), num_heads, 16, dtype=best_dtype(backend))
    whole = forward_backward(partial(attention, alibi_slopes=slopes_of(num_heads), backend=backend.name), inputs)
    count = num_heads // tensor_parallel_size
    shards = []
    for rank in range(tensor_parallel_size):
        slopes = local_slopes(num_heads, rank * count, count)
        local = [x[:, :, rank * count : (rank + 1) * count] for x in inputs]
        shards.append(forward_backward(partial(attention, alibi_slopes=slopes, backend=backend.name), local))
    together = [torch.cat(pieces, dim=2) for pieces in zip(*shards, strict=True)]
    assert max(relative_errors(together, whole)) < BOUNDS[inputs[0].dtype]


@every_backend_and_dtype
def test_trap_3_the_bias_is_not_rounded_to_16_bits(make_inputs, backend, dtype):
    keys, num_heads = pick(backend, (2048, 8), (600, 2))
    q, k, _, _ = make_inputs(1, 16, num_heads, 64, keys=keys, dtype=dtype)
    slopes = slopes_of(8)[:num_heads]
    in_fp64 = [x.double().transpose(1, 2) for x in (q, k)]
    exact = exact_rows(*in_fp64, slopes, keys - 16)[0]

    def mean_total_variation(rows):
        return ((rows.double() - exact).abs().sum(-1) / 2).mean()

    bf16_bias = (slopes[:, None] * torch.arange(keys)).bfloat16().double()[:, None]
    no_bias = exact_rows(*in_fp64, None, keys - 16)[0]
    rounded = (no_bias.log() + bf16_bias).softmax(-1)
    assert mean_total_variation(rounded) > TOTAL_VARIATION_OF_BF16_BIAS

    rows = measured_rows(partial(attention, alibi_slopes=slopes, backend=backend.name), q, k)
    rounds_scores = backend.name == "unfused" and dtype == torch.bfloat16
    assert mean_total_variation(rows) < (TOTAL_VARIATION_UNFUSED_BF16 if rounds_scores else TOTAL_VARIATION_EXACT)


@gpu
@every_backend
def test_trap_3_autocast_does_not_round_the_bias(make_inputs, backend):
    length, num_heads = pick(backend, (700, 12), (90, 2))
    dtype = torch.float32 if torch.float32 in backend.dtypes else torch.float16  # it leaves fp64 alone
    q, k, v, _ = make_inputs(1, length, num_heads, HEAD_DIM, dtype=dtype)
    attend = partial(attention, alibi_slopes=slopes_of(num_heads), backend=backend.name)
    with skipping_what_its_build_lacks():
        expected = attend(q, k, v)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(attend(q, k, v), expected)


@every_backend
def test_trap_4_no_scale_multiplies_the_bias(make_inputs, relative_errors, backend):
    length, num_heads = pick(backend, (300, 12), (60, 2))
    q, k, v, _ = make_inputs(1, length, num_heads, 16, dtype=best_dtype(backend))
    slopes = slopes_of(num_heads)
    attend = partial(attention, alibi_slopes=slopes, backend=backend.name)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    bias_alone = (-slopes.double()[:, None, None] * distance).masked_fill(distance < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("hij,bjhk->bihk", bias_alone, v.double())
    for softmax_scale in (0.01, 1.0, 100.0):
        output = attend(torch.zeros_like(q), k, v, softmax_scale=softmax_scale)
        assert relative_errors([output], [expected]) < [BOUNDS[q.dtype]]
    # Query-key layer scaling: q / n and softmax_scale * n is the same attention.
    scaled = attend(q / 8, k, v, softmax_scale=8 * 16**-0.5)
    assert relative_errors([scaled], [attend(q, k, v).double()]) < [BOUNDS[q.dtype]]

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import alibi_attention
from alibi_attention import alibi_slopes, attention
from alibi_attention.backends.folded import cpu as folded_cpu
from alibi_attention.backends.folded import folded
from alibi_attention.bench.contract import exact_attention, exact_rows, measured_rows

FP64_BOUND = 1e-13  # ||x - x64|| / ||x64||
FP32_ERROR = 1e-5  # the largest, relative to the largest value, however long the sequence
# m j of the extra dimensions is summed in fp32: numbers up to m S / 2, spaced by 2^-17 at 64 and 2^-14 at 512.
FP32_ERROR_EXTRA_DIMS = 1e-4
ERROR_FACTOR_16_BIT = 2.0  # times the error of plain SDPA in the same type
TOTAL_VARIATION_EXACT = 1e-3
MAX_PEAK_MIB_16384 = 160  # q, k, v and output are 2 each; one S x S fp32 matrix of one head would be 1024

attend = partial(attention, backend="folded")
attend_ref = partial(attention, backend="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def attend_with_extra_dims(q, k, v, *, alibi_slopes, softmax_scale=None, query_offset=0):
    """What a GPU computes, here on PyTorch's CPU kernels."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return folded.attend_with_extra_dims(q, k, v, alibi_slopes, scale, query_offset)


def largest_errors(results, exact):
    return [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(results, exact, strict=True)]


def plan(horizon, slope, queries, keys, query_offset, dtype=torch.float32):
    return folded_cpu.plan_head(horizon, slope, queries, keys, query_offset, dtype)


def test_it_runs_wherever_the_suite_runs():
    assert folded.capability().usable, folded.capability().reason


def test_a_pytorch_that_cannot_do_it_is_found_out(monkeypatch):
    def without_mask(q, k, v, dropout_p, is_causal, *, attn_mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), None

    monkeypatch.setattr(folded_cpu, "_forward", without_mask)
    assert folded_cpu.find_missing().endswith("takes a mask in causal mode for something else")
    # The operator for a GPU, which takes no mask at all.
    monkeypatch.setattr(folded_cpu, "_forward", torch.ops.aten._scaled_dot_product_flash_attention)
    assert "takes no mask in causal mode: " in folded_cpu.find_missing()
    monkeypatch.setattr(folded_cpu, "_forward", None)
    assert folded_cpu.find_missing() == "this PyTorch has no flash attention for a CPU"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 3000),
    keys=st.integers(1, 3000),
    query_offset=st.sampled_from([0, 0, 1, 700]),
    horizon=st.integers(0, 3000) | st.sampled_from([64, 128, 320, 640]),
    slope=st.sampled_from([0.0, 2.0**-8, 0.5, -0.5]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_query_is_in_one_call_that_shows_it_all_it_needs(queries, keys, query_offset, horizon, slope, dtype):
    nearest = query_offset + queries - keys  # a horizon reaches the nearest key, else it is none
    horizon = min(max(horizon, nearest), query_offset + queries - 1)
    position = query_offset
    for part in plan(horizon, slope, queries, keys, query_offset, dtype):
        for block in range(part.blocks):
            first_key = part.first_key + block * part.queries
            assert part.first_query + block * part.queries == position - query_offset
            assert 0 <= first_key <= max(0, position - horizon)
            position += part.queries
            assert first_key + part.keys == min(position, keys)
        assert not part.causal or part.first_query == part.first_key == query_offset == 0
        assert not part.causal or abs(slope) * part.keys <= 128
        assert part.blocks == 1 or part.keys % part.queries == 0
    assert position == query_offset + queries


def test_work_follows_the_horizon():
    """What is computed for each query of 16,384 tokens: little more than the horizon, and never more than all."""
    for horizon in (70, 140, 280, 560, 1100, 2300, 4600):
        pairs = sum(part.blocks * part.queries * part.keys for part in plan(horizon, 35 / horizon, 16384, 16384, 0))
        assert pairs < 16384 * (1.35 * horizon + 100)
    (whole,) = plan(14000, 35 / 14000, 16384, 16384, 0)
    assert whole.causal


def test_a_bias_by_column_is_a_small_number():
    """m * 250 is 125 at slope 1/2, and half of that counted from the middle."""
    (part,) = plan(250, 0.5, 250, 250, 0)
    bias = folded_cpu._bias(part, torch.tensor([0.5]), 0)
    assert bias.shape == (1, 1, 1, 250)
    assert torch.equal(bias.diff(), torch.full((1, 1, 1, 249), 0.5))
    assert bias.abs().max() < 64


def test_heads_of_one_plan_share_a_call():
    local, whole = plan(70, 0.5, 4096, 4096, 0), plan(4095, 2.0**-8, 4096, 4096, 0)
    groups = folded_cpu.group_heads([whole, whole, local, local, whole])
    assert groups == [
        (slice(0, 2), whole),
        (slice(2, 3), local),
        (slice(3, 4), local),
        (slice(4, 5), whole),
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 700),
    cached=st.sampled_from([0, 0, 0, 1, 300]),
    beyond=st.sampled_from([0, 0, 0, 1, 90]),
    head_dim=st.integers(1, 33),
    slopes=st.lists(st.sampled_from([2.0**-8, 0.1, 0.5, 2.0, 2.0, 4.0, 0.0, -0.1]), min_size=1, max_size=4),
    softmax_scale=st.sampled_from([None, 0.5, -0.5, 0.0]),
)
def test_any_shape_against_the_reference(batch, queries, cached, beyond, head_dim, slopes, softmax_scale):
    """In fp64, at lengths at which steep heads are computed in blocks."""
    keys, query_offset = queries + cached, cached + beyond
    q, upstream = torch.randn(2, batch, queries, len(slopes), head_dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, len(slopes), head_dim, dtype=torch.float64)
    arguments = {
        "alibi_slopes": torch.tensor(slopes),
        "softmax_scale": softmax_scale,
        "query_offset": query_offset,
    }
    results = []
    for function in (attend, attend_ref):
        qkv = [x.clone().requires_grad_() for x in (q, k, v)]
        output = function(*qkv, **arguments)
        results.append([output, *torch.autograd.grad(output, qkv, upstream)])
    at_least = results[1][0].norm()
    for x, y in zip(*results, strict=True):
        assert (x - y).norm() <= FP64_BOUND * torch.maximum(y.norm(), at_least)


@pytest.mark.parametrize("horizon_eps", [2.0**-24, 0.0])
def test_fp32_at_4096_tokens(make_inputs, forward_backward, horizon_eps):
    inputs = make_inputs(1, 4096, 4, 64)
    slopes = torch.tensor([0.5, 0.25, 2.0**-4, 2.0**-8])
    results = forward_backward(partial(attend, alibi_slopes=slopes, horizon_eps=horizon_eps), inputs)
    assert max(largest_errors(results, exact_attention(inputs, slopes))) < FP32_ERROR


def test_fp32_at_16384_tokens(make_inputs, forward_backward):
    """Counted from the start, m j is 8,192 at slope 1/2, where fp32 has steps of 1e-3."""
    inputs = make_inputs(1, 16384, 2, 32)
    slopes = torch.tensor([0.5, 2.0**-8])
    results = forward_backward(partial(attend, alibi_slopes=slopes), inputs)
    assert max(largest_errors(results, exact_attention(inputs, slopes))) < FP32_ERROR


def test_a_chunk_far_beyond_the_keys_loses_no_digits(make_inputs, forward_backward):
    inputs = make_inputs(1, 80, 3, 16, keys=90)
    arguments = {"alibi_slopes": torch.tensor([0.5, 2.0**-4, 2.0**-8]), "query_offset": 1_000_000}
    exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
    assert max(largest_errors(forward_backward(partial(attend, **arguments), inputs), exact)) < FP32_ERROR


def test_fp64_is_not_cut_to_fp32(make_inputs):
    """A share of 2^-24 is nothing in fp32 and much in fp64."""
    q, k, v, _ = make_inputs(1, 1024, 1, 16, dtype=torch.float64)
    v[:, :-200] *= 1e9
    output = attend(q[:, -1:], k, v, alibi_slopes=torch.tensor([0.15]))
    exact = attend_ref(q[:, -1:], k, v, alibi_slopes=torch.tensor([0.15]))
    torch.testing.assert_close(output, exact, rtol=0, atol=1e-6)


def test_no_gradient_of_what_is_past_the_horizon(make_inputs):
    q, k, v, _ = make_inputs(1, 1024, 1, 16)
    k, v = k.requires_grad_(), v.requires_grad_()
    output = attend(q, k, v, alibi_slopes=torch.tensor([0.5]), horizon_eps=1e-3)
    grad_k, grad_v = torch.autograd.grad(output[:, -1:].sum(), (k, v))
    assert grad_k[:, :700].abs().max() == grad_v[:, :700].abs().max() == 0.0
    assert (grad_v[:, -10:].abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("num_keys", [1, 97, 16384, 2**17, 2**17 + 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax_scale", [0.125, 64**-0.5 / 3, 1.0])
def test_the_pieces_are_the_bias(num_keys, dtype, softmax_scale):
    slopes = torch.tensor([0.5, 2.0**-8, 2.0**-0.5, 2.0**-7.5])
    slope_pieces, position_pieces = folded.fold(slopes, softmax_scale, num_keys, dtype)
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


PEAK_MEMORY = """
import torch
from alibi_attention import alibi_slopes, attention

def forward_backward(seq_length):
    q, k, v = (torch.randn(1, seq_length, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for slope in alibi_slopes(8)[[0, 4, 5, 7]].split(1):
        attention(q, k, v, alibi_slopes=slope, backend="folded").sum().backward()
    attention(q, k, v, alibi_slopes=slope, horizon_eps=0.0, backend="folded").sum().backward()

def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

peaks = []
for seq_length in (256, 8192, 16384):
    forward_backward(seq_length)
    peaks.append(peak_kib() / 1024)
print(*peaks)
"""


def test_memory_of_blocks_is_linear_at_16384_tokens():
    source_root = Path(alibi_attention.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], cwd=source_root, capture_output=True, text=True, check=True
    )
    up_to_8192, up_to_16384 = (after - before for before, after in pairwise(map(float, done.stdout.split())))
    assert up_to_8192 + up_to_16384 < MAX_PEAK_MIB_16384
    assert up_to_16384 < 2 * up_to_8192

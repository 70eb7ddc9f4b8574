from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import alibi_attention
from alibi_attention import alibi_slopes, attention
from alibi_attention.sdpa import reversed_bias

FP32_ATOL = 1e-5  # output and gradients of standard normal inputs, against fp64
FP64_ATOL = 1e-12
ERROR_FACTOR_16_BIT = 2.0  # times the error of plain SDPA in the same type
TOTAL_VARIATION_EXACT = 1e-3
TOTAL_VARIATION_OF_BF16_BIAS = 0.05
MAX_PEAK_MIB_16384 = 64  # one S x S fp32 matrix of one head would be 1024

attend_sdpa = partial(attention, backend="sdpa")
attend_ref = partial(attention, backend="reference")


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def max_errors(results, exact):
    return [(x - y).abs().max().item() for x, y in zip(results, exact, strict=True)]


@pytest.mark.parametrize(("seq_length", "num_heads"), [(1, 12), (97, 12), (97, 20), (1025, 12)])
def test_fp32_output_and_gradients_against_fp64(make_inputs, forward_backward, seq_length, num_heads):
    inputs = make_inputs(1, seq_length, num_heads, 16)
    slopes = alibi_slopes(num_heads)
    results = forward_backward(partial(attend_sdpa, alibi_slopes=slopes), inputs)
    exact = forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64)
    assert max(max_errors(results, exact)) < FP32_ATOL


@pytest.mark.parametrize("seq_length", [1, 97, 1025])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_that_of_plain_sdpa(make_inputs, forward_backward, seq_length, dtype):
    inputs = make_inputs(1, seq_length, 5, 64, dtype=dtype)
    with_bias = partial(attend_sdpa, alibi_slopes=alibi_slopes(5))
    with_bias_ref = partial(attend_ref, alibi_slopes=alibi_slopes(5))
    errors = max_errors(forward_backward(with_bias, inputs), forward_backward(with_bias_ref, inputs, torch.float64))
    plain_ref = partial(attend_ref, alibi_slopes=None)
    plain = max_errors(forward_backward(plain_sdpa, inputs), forward_backward(plain_ref, inputs, torch.float64))
    for name, error, plain_error in zip(("output", "dq", "dk", "dv"), errors, plain, strict=True):
        assert error <= ERROR_FACTOR_16_BIT * plain_error, f"{name}: {error} against {plain_error}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    cached=st.integers(0, 40),
    num_heads=st.integers(1, 7),
    head_dim=st.integers(1, 33),
    with_slopes=st.booleans(),
)
def test_any_shape_against_the_reference(batch, queries, cached, num_heads, head_dim, with_slopes):
    q, upstream = torch.randn(2, batch, queries, num_heads, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, cached + queries, num_heads, head_dim, dtype=torch.float64)
    results = []
    for attend in (attend_sdpa, attend_ref):
        qkv = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attend(*qkv, alibi_slopes=alibi_slopes(num_heads) if with_slopes else None)
        results.append([output, *torch.autograd.grad(output, qkv, upstream)])
    assert max(max_errors(*results)) < FP64_ATOL


@pytest.mark.parametrize("view", ["head_dim_outermost", "packed_qkv", "every_second_channel", "transposed_batch"])
def test_strided_inputs(view):
    packed = torch.randn(2, 300, 3, 3, 16)
    q, k, v = {
        "head_dim_outermost": lambda: torch.randn(3, 16, 2, 300, 3).permute(0, 2, 3, 4, 1),
        "packed_qkv": lambda: packed.unbind(2),
        "every_second_channel": lambda: torch.randn(3, 2, 300, 3, 32)[..., ::2],
        "transposed_batch": lambda: torch.randn(3, 300, 2, 3, 16).transpose(1, 2),
    }[view]()
    assert not q.is_contiguous()
    output = attend_sdpa(q, k, v, alibi_slopes=alibi_slopes(3))
    contiguous = attend_sdpa(q.contiguous(), k.contiguous(), v.contiguous(), alibi_slopes=alibi_slopes(3))
    torch.testing.assert_close(output, contiguous, rtol=0, atol=FP32_ATOL)


@pytest.mark.parametrize("slopes", [alibi_slopes(3), None], ids=["alibi", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_with_empty_and_one_token_ones(make_inputs, forward_backward, slopes, dtype):
    inputs = make_inputs(2, 500, 3, 16, dtype=dtype)
    cu_seqlens = torch.tensor([0, 0, 1, 2, 300, 300, 500, 800, 999, 1000], dtype=torch.int32)
    arguments = {"alibi_slopes": slopes, "cu_seqlens": cu_seqlens}
    results = forward_backward(partial(attend_sdpa, **arguments), inputs)
    exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
    assert max(max_errors(results, exact)) < (FP32_ATOL if dtype == torch.float32 else FP64_ATOL)


@pytest.mark.parametrize("slopes", [alibi_slopes(12), None], ids=["alibi", "no bias"])
def test_queries_given_in_pieces_are_the_rows_of_the_whole(make_inputs, slopes):
    q, k, v, _ = make_inputs(1, 700, 12, 16, dtype=torch.float64)
    whole = attend_sdpa(q, k, v, alibi_slopes=slopes)
    for start, end in ((0, 700), (0, 1), (100, 600), (699, 700)):
        piece = attend_sdpa(q[:, start:end], k, v, alibi_slopes=slopes, query_offset=start)
        torch.testing.assert_close(piece, whole[:, start:end], rtol=0, atol=FP64_ATOL)
    last = attend_sdpa(q[:, 300:], k, v, alibi_slopes=slopes)
    torch.testing.assert_close(last, whole[:, 300:], rtol=0, atol=FP64_ATOL)


def test_queries_past_the_last_key(make_inputs):
    q, k, v, _ = make_inputs(1, 600, 12, 16, keys=400, dtype=torch.float64)
    arguments = {"alibi_slopes": alibi_slopes(12), "query_offset": 350}
    torch.testing.assert_close(
        attend_sdpa(q, k, v, **arguments), attend_ref(q, k, v, **arguments), rtol=0, atol=FP64_ATOL
    )


@pytest.mark.parametrize("attend", [attend_sdpa, attend_ref], ids=["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slopes", [alibi_slopes(64), None], ids=["alibi", "no bias"])
def test_dropout_keeps_exact_weights_and_drops_the_rest(make_inputs, attend, dtype, slopes):
    q, k, _, _ = make_inputs(1, 64, 64, 64, dtype=dtype)
    identity = torch.eye(64, dtype=dtype)[None, :, None].expand_as(k)
    dropout_p = 0.25
    kept = attend(q, k, identity, alibi_slopes=slopes, dropout_p=dropout_p).double() * (1 - dropout_p)
    weights = attend_ref(q.double(), k.double(), identity.double(), alibi_slopes=slopes)
    is_kept = kept != 0
    rounding = 2 * torch.finfo(dtype).eps + FP32_ATOL
    torch.testing.assert_close(kept[is_kept], weights[is_kept], rtol=rounding, atol=FP32_ATOL)
    visible = weights > 0
    assert (is_kept & visible).sum() / visible.sum() == pytest.approx(1 - dropout_p, abs=0.01)


def test_reversed_bias_is_the_bias_on_a_single_vector():
    slopes = alibi_slopes(12)
    bias = reversed_bias(slopes, 5, 9, last_position=8)
    distance = torch.arange(4, 9)[:, None] - torch.arange(9)
    expected = torch.where(distance >= 0, -slopes[:, None, None] * distance, -torch.inf)
    assert torch.equal(bias.flip(1), expected)
    assert bias.untyped_storage().nbytes() == 12 * (5 + 9 - 1) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [attend_sdpa, attend_ref], ids=["sdpa", "reference"])
def test_trap_3_a_bias_in_16_bits_is_not_alibi(make_inputs, attend, dtype):
    keys, num_heads, head_dim = 2048, 8, 64
    q, k, _, _ = make_inputs(1, 64, num_heads, head_dim, keys=keys, dtype=dtype)
    slopes = alibi_slopes(num_heads)

    scores = torch.einsum("bihk,bjhk->hij", q.double(), k.double()) / head_dim**0.5
    column = torch.arange(keys)
    distance = torch.arange(keys - 64, keys)[:, None] - column

    def softmax(bias):
        return (scores + bias).masked_fill(distance < 0, -torch.inf).softmax(-1)

    def mean_total_variation(rows):
        return ((rows - exact_rows).abs().sum(-1) / 2).mean()

    exact_rows = softmax(-slopes.double()[:, None, None] * distance)
    bf16_bias = (slopes[:, None] * column).bfloat16().double()[:, None]
    assert mean_total_variation(softmax(bf16_bias)) > TOTAL_VARIATION_OF_BF16_BIAS

    # Attending to columns of the identity gives the attention rows themselves.
    identity = torch.eye(keys, dtype=dtype)[None, :, None].expand(1, keys, num_heads, keys)
    pieces = [attend(q, k, values, alibi_slopes=slopes) for values in identity.split(head_dim, dim=-1)]
    rows = torch.cat(pieces, dim=-1)[0].transpose(0, 1).double()
    assert mean_total_variation(rows) < TOTAL_VARIATION_EXACT


@pytest.mark.parametrize("attend", [attend_sdpa, attend_ref], ids=["sdpa", "reference"])
def test_trap_3_autocast_does_not_round_the_bias(make_inputs, attend):
    q, k, v, _ = make_inputs(1, 700, 12, 16)
    expected = attend(q, k, v, alibi_slopes=alibi_slopes(12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(q, k, v, alibi_slopes=alibi_slopes(12)), expected)


@pytest.mark.parametrize("attend", [attend_sdpa, attend_ref], ids=["sdpa", "reference"])
def test_trap_4_no_scale_multiplies_the_bias(make_inputs, attend):
    q, k, v, _ = make_inputs(1, 300, 12, 16)
    slopes = alibi_slopes(12)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    bias_alone = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("hij,bjhk->bihk", bias_alone, v)
    for softmax_scale in (0.01, 1.0, 100.0):
        output = attend(torch.zeros_like(q), k, v, alibi_slopes=slopes, softmax_scale=softmax_scale)
        torch.testing.assert_close(output, expected, rtol=0, atol=FP32_ATOL)
    # Query-key layer scaling: q / n and softmax_scale * n is the same attention.
    scaled = attend(q / 8, k, v, alibi_slopes=slopes, softmax_scale=8 * 16**-0.5)
    torch.testing.assert_close(scaled, attend(q, k, v, alibi_slopes=slopes), rtol=0, atol=FP32_ATOL)


PEAK_MEMORY = """
import torch
from alibi_attention import alibi_slopes, attention

def forward_backward(seq_length):
    q, k, v = (torch.randn(1, seq_length, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attention(q, k, v, alibi_slopes=alibi_slopes(1), backend="sdpa").sum().backward()

def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

forward_backward(256)
before = peak_kib()
forward_backward(16384)
print((peak_kib() - before) / 1024)
"""


def test_memory_is_linear_at_16384_tokens():
    source_root = Path(alibi_attention.__file__).parents[1]
    command = [sys.executable, "-c", PEAK_MEMORY]
    # A fresh process, since a peak never falls. VmHWM, not ru_maxrss: the latter inherits the parent's peak.
    done = subprocess.run(command, cwd=source_root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < MAX_PEAK_MIB_16384

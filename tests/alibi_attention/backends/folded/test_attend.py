from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alibi_attention
from alibi_attention import attention
from alibi_attention.backends.folded import attend as folded
from alibi_attention.bench.contract import exact_attention

FP64_BOUND = 1e-13  # ||x - x64|| / ||x64||
FP32_ERROR = 1e-5  # the largest, relative to the largest value, however long the sequence
MAX_PEAK_MIB_16384 = 160  # q, k, v and output are 2 each; one S x S fp32 matrix of one head would be 1024
attend = partial(attention, backend="folded")
attend_ref = partial(attention, backend="reference")


def largest_errors(results, exact):
    return [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(results, exact, strict=True)]


def test_it_runs_wherever_the_suite_runs():
    assert folded.capability().usable, folded.capability().reason


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 700),
    cached=st.sampled_from([0, 0, 0, 1, 300]),
    beyond=st.sampled_from([0, 0, 0, 1, 90]),
    head_dim=st.integers(1, 33),
    slopes=st.lists(st.sampled_from([2.0**-8, 0.1, 0.5, 2.0, 2.0, 4.0, 0.0, -0.1]), min_size=1, max_size=4),
    softmax_scale=st.sampled_from([None, 0.5]),
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

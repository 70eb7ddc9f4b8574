from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import alibi_attention
from alibi_attention import alibi_slopes, attention, backends, resolve_backend
from alibi_attention.backends.triton import attend as triton_kernel
from alibi_attention.backends.triton import tiles as triton_tiles
from alibi_attention.backends.triton.geometry import make_geometry
from tests.support.device import DEVICE

FP32_ATOL = 1e-5  # output and gradients of standard normal inputs, against fp64
ERROR_FACTOR = 2.0  # times the error of SDPA in the same type
BLOCK = 64  # tokens of a block in the interpreter, and of fp32 on a GPU

attend_triton = partial(attention, backend="triton")
attend_ref = partial(attention, backend="reference")
gpu = pytest.mark.gpu  # elsewhere lengths are for the interpreter's blocks, or every_backend/ does the same


def max_errors(results, exact):
    return [(x - y).abs().max().item() for x, y in zip(results, exact, strict=True)]


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def slopes_of(*slopes):
    return torch.tensor(slopes, device=DEVICE)


def find_first_keys(q, k, v, slopes, horizon_eps=2.0**-24):
    """The first key of each query block [groups, blocks], as the forward pass stores it for the backward."""
    block = triton_tiles.block_tokens(q.dtype)
    geometry, documents = make_geometry(q, k, None, k.shape[1] - q.shape[1], block)
    return triton_kernel.run_forward(q, k, v, slopes, geometry, documents, q.shape[-1] ** -0.5, horizon_eps)[2]


def attend_from(q, k, v, slopes, first_keys):
    """The equation over the keys from each query block's first key on; one sequence."""
    position, keys = torch.arange(q.shape[1], device=DEVICE), torch.arange(k.shape[1], device=DEVICE)
    distance = (position + k.shape[1] - q.shape[1])[:, None] - keys
    first = first_keys[:, position // BLOCK]
    visible = (distance >= 0) & (keys >= first[:, :, None])
    scores = torch.einsum("bihk,bjhk->hij", q, k) * q.shape[-1] ** -0.5 - slopes[:, None, None] * distance
    return torch.einsum("hij,bjhk->bihk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    ("seq_length", "num_heads", "head_dim"),
    [(1, 3, 64), (97, 12, 32), (257, 2, 64), (97, 2, 80), (65, 2, 128), (40, 2, 256), (40, 2, 7)],
)
def test_fp32_output_and_gradients_against_fp64(make_inputs, forward_backward, seq_length, num_heads, head_dim):
    inputs = make_inputs(1, seq_length, num_heads, head_dim)
    slopes = alibi_slopes(num_heads)
    results = forward_backward(partial(attend_triton, alibi_slopes=slopes), inputs)
    exact = forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64)
    assert max(max_errors(results, exact)) < FP32_ATOL


@pytest.mark.parametrize(("seq_length", "head_dim"), [(33, 32), (97, 64), (65, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_that_of_plain_sdpa(make_inputs, forward_backward, seq_length, head_dim, dtype):
    inputs = make_inputs(1, seq_length, 3, head_dim, dtype=dtype)
    with_bias = partial(attend_triton, alibi_slopes=alibi_slopes(3))
    with_bias_ref = partial(attend_ref, alibi_slopes=alibi_slopes(3))
    errors = max_errors(forward_backward(with_bias, inputs), forward_backward(with_bias_ref, inputs, torch.float64))
    plain_ref = partial(attend_ref, alibi_slopes=None)
    plain = max_errors(forward_backward(plain_sdpa, inputs), forward_backward(plain_ref, inputs, torch.float64))
    for name, error, plain_error in zip(("output", "dq", "dk", "dv"), errors, plain, strict=True):
        assert error <= ERROR_FACTOR * plain_error, f"{name}: {error} against {plain_error}"


@pytest.mark.parametrize(
    ("queries", "keys", "query_offset"),
    [(30, 130, None), (30, 130, 50), (70, 130, 33), (60, 40, 20), (60, 70, 200)],
    ids=["at the end", "in the middle", "across blocks", "some past the last key", "all past the last key"],
)
@pytest.mark.parametrize("slopes", [alibi_slopes(2), None], ids=["alibi", "no bias"])
def test_queries_elsewhere_than_keys(make_inputs, forward_backward, queries, keys, query_offset, slopes):
    inputs = make_inputs(1, queries, 2, 32, keys=keys)
    arguments = {"alibi_slopes": slopes, "query_offset": query_offset}
    results = forward_backward(partial(attend_triton, **arguments), inputs)
    exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
    assert max(max_errors(results, exact)) < FP32_ATOL


@pytest.mark.parametrize("slopes", [alibi_slopes(2), None], ids=["alibi", "no bias"])
def test_documents_with_empty_and_one_token_ones(make_inputs, forward_backward, slopes):
    inputs = make_inputs(2, 147, 2, 32)
    cu_seqlens = torch.tensor([0, 0, 1, 2, 70, 70, 232, 293, 294], dtype=torch.int32)
    arguments = {"alibi_slopes": slopes, "cu_seqlens": cu_seqlens}
    results = forward_backward(partial(attend_triton, **arguments), inputs)
    exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
    assert max(max_errors(results, exact)) < FP32_ATOL


def test_a_document_is_the_same_to_the_bit_alone_and_among_others(make_inputs):
    q, k, v, _ = make_inputs(1, 300, 2, 32)
    k[:, 20] *= 1e4  # is the first document's own affair, also when the others find their horizons
    slopes = torch.tensor([1.0, 0.5])
    packed = attend_triton(q, k, v, alibi_slopes=slopes, cu_seqlens=torch.tensor([0, 40, 240, 300], dtype=torch.int32))
    for start, end in ((0, 40), (40, 240), (240, 300)):
        alone = attend_triton(*(x[:, start:end] for x in (q, k, v)), alibi_slopes=slopes)
        assert torch.equal(packed[:, start:end], alone)


@gpu
def test_boundaries_that_were_changed_in_place_are_read_again(make_inputs):
    q, k, v, _ = make_inputs(1, 40, 2, 32)
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)
    for boundary in (10, 30):
        cu_seqlens[1] = boundary
        output = attend_triton(q, k, v, alibi_slopes=None, cu_seqlens=cu_seqlens)
        expected = attend_ref(q, k, v, alibi_slopes=None, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(output, expected, rtol=0, atol=FP32_ATOL)
    cu_seqlens[2] = 39
    with pytest.raises(ValueError, match="cu_seqlens: must rise from 0 to the batch's 40 tokens"):
        attend_triton(q, k, v, alibi_slopes=None, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("view", ["head_dim_outermost", "packed_qkv", "every_second_channel", "heads_first"])
def test_strided_inputs_and_gradients(view):
    q, k, v = {
        "head_dim_outermost": lambda: torch.randn(3, 16, 2, 50, 3).permute(0, 2, 3, 4, 1),
        "packed_qkv": lambda: torch.randn(2, 50, 3, 3, 16).unbind(2),
        "every_second_channel": lambda: torch.randn(3, 2, 50, 3, 32)[..., ::2],
        "heads_first": lambda: torch.randn(3, 2, 3, 50, 16).transpose(2, 3),
    }[view]()
    assert not q.is_contiguous()
    results = []
    for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = attend_triton(*inputs, alibi_slopes=alibi_slopes(3))
        # The sum's gradient is one number, expanded with strides of 0.
        results.append([output, *torch.autograd.grad(output.sum(), inputs)])
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@gpu
def test_steep_heads_visit_a_few_blocks_at_any_length_and_shallow_ones_all(make_inputs):
    q, k, v, _ = make_inputs(1, 640, 2, 32, dtype=torch.bfloat16)
    first_keys, block = find_first_keys(q, k, v, slopes_of(1.0, 2.0**-8)).cpu(), triton_tiles.block_tokens(q.dtype)
    visited = torch.arange(640 // block) + 1 - first_keys // block
    # 2^-24 = exp(-17), and |q| |k| / sqrt(32) is 6 on average and 12 at most or so: about 30 keys at slope 1.
    assert visited[0].max() == 2
    assert first_keys[1].max() == 0


@gpu
@pytest.mark.parametrize("kind", ["random", "aligned", "opposed", "zero queries"])
@pytest.mark.parametrize("horizon_eps", [2.0**-24, 1e-3])
def test_the_horizon_changes_no_more_than_it_promises(make_inputs, kind, horizon_eps):
    q, k, v, _ = make_inputs(1, 257, 2, 32)
    if kind in ("aligned", "opposed"):  # every score is at its bound; the query's own key gives M_i its least value
        q = k = torch.ones_like(k)
        q = q if kind == "aligned" else -q
    if kind == "zero queries":
        q = torch.zeros_like(q)
    v = v.sign()  # what is left out is seen in full
    slopes = slopes_of(1.0, 0.25)
    assert find_first_keys(q, k, v, slopes, horizon_eps)[0].max() > 0
    near = attend_triton(q, k, v, alibi_slopes=slopes, horizon_eps=horizon_eps)
    exact = attend_ref(*(x.double() for x in (q, k, v)), alibi_slopes=slopes)
    assert (near - exact).abs().max() <= 2 * horizon_eps * v.abs().max() + FP32_ATOL


def test_without_eps_every_block_is_visited_and_a_horizon_nobody_reaches_changes_no_bit(make_inputs, forward_backward):
    inputs = make_inputs(1, 130, 2, 32)
    q, k, v, _ = inputs
    assert find_first_keys(q, k, v, torch.tensor([4.0, 0.5]), horizon_eps=0.0) is None
    shallow = 2.0 ** -torch.tensor([7.0, 8.0])
    assert find_first_keys(q, k, v, shallow).max() == 0
    off, on = (
        forward_backward(partial(attend_triton, alibi_slopes=shallow, horizon_eps=eps), inputs) for eps in (0.0, 2**-24)
    )
    assert all(torch.equal(x, y) for x, y in zip(off, on, strict=True))


@gpu
def test_one_far_key_with_a_huge_norm_is_found(make_inputs, forward_backward):
    inputs = make_inputs(1, 257, 2, 32)
    q, k, v, _ = inputs
    slopes = slopes_of(0.25, 0.2)
    assert (find_first_keys(q, k, v, slopes)[:, -1] > 0).all()
    q[:, 200:] = q[:, 200:].abs()
    k[:, 5], v[:, 5] = 30.0, 2.0
    results = forward_backward(partial(attend_triton, alibi_slopes=slopes), inputs)
    exact = forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64)
    assert (exact[0][:, 200:] - 2.0).abs().max() < 0.1  # it holds nearly all weight
    # A rounding of so large a score, or of the log-sum-exp that a backward pass without the matrix of weights starts
    # from, is 1e-5 of a weight, more than FP32_ATOL: there are two of them, relative to the results.
    largest_score = torch.einsum("bihk,bhk->bih", q, k[:, 5]).max().item() * q.shape[-1] ** -0.5
    assert 100 < largest_score < 300
    for error, expected in zip(max_errors(results, exact), exact, strict=True):
        assert error <= 2 * 2.0**-24 * largest_score * expected.abs().max()


@gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a far key", "a query"])
def test_what_is_no_number_is_never_left_out(make_inputs, value, where):
    q, k, v, _ = make_inputs(1, 257, 1, 32)
    (k if where == "a far key" else q)[:, 3 if where == "a far key" else 250, 0, 7] = value
    first_keys = find_first_keys(q, k, v, slopes_of(1.0))[0]
    asked = slice(1, None) if where == "a far key" else slice(250 // BLOCK, 250 // BLOCK + 1)
    assert (first_keys[asked] == 0).all()
    assert find_first_keys(q, k, v, slopes_of(float("nan"))).max() == 0
    assert find_first_keys(q, k, v, slopes_of(-1.0)).max() == 0


@gpu
@pytest.mark.parametrize("far_sighted_block", [None, 3], ids=["monotone", "one block looks further than the next"])
def test_the_backward_pass_visits_what_the_forward_pass_did(make_inputs, forward_backward, far_sighted_block):
    inputs = make_inputs(1, 257, 2, 32)
    # Scores near 0 and a large eps: what is left out is plain to see.
    inputs[0].mul_(0.1)
    if far_sighted_block is not None:
        inputs[0][:, far_sighted_block * BLOCK : (far_sighted_block + 1) * BLOCK] *= 20
    slopes, horizon_eps = slopes_of(0.07, 0.06), 0.9
    first_keys = find_first_keys(*inputs[:3], slopes, horizon_eps)
    assert first_keys.max() > 0
    assert (first_keys.diff() < 0).any() == (far_sighted_block is not None)
    results = forward_backward(partial(attend_triton, alibi_slopes=slopes, horizon_eps=horizon_eps), inputs)
    exact = forward_backward(partial(attend_from, slopes=slopes, first_keys=first_keys), inputs, torch.float64)
    assert max(max_errors(results, exact)) < FP32_ATOL
    whole = forward_backward(partial(attend_ref, alibi_slopes=slopes), inputs, torch.float64)
    assert min(max_errors(results, whole)) > 10 * FP32_ATOL


def test_in_the_interpreter_it_is_chosen_by_name_alone():
    (capability,) = (backend for backend in backends() if backend.name == "triton")
    assert capability.usable
    assert not capability.auto
    for dtype in capability.dtypes:
        assert resolve_backend("triton", "cpu", dtype, 64) == "triton"
        assert resolve_backend("auto", "cpu", dtype, 64) != "triton"
    with pytest.raises(RuntimeError, match="triton: it has no attention dropout"):
        resolve_backend("triton", "cpu", torch.float32, 64, dropout=True)
    with pytest.raises(RuntimeError, match="triton: head_dim 257 is more than 256"):
        resolve_backend("triton", "cpu", torch.float32, 257)


def run_python(*arguments: str) -> str:
    """Run Python without the interpreter, which a process chooses once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(alibi_attention.__file__).parents[1])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_without_triton_it_says_so_and_the_package_works():
    program = "import sys; sys.modules['triton'] = None; from alibi_attention import backends; "
    program += "print(*(b.reason for b in backends() if b.name == 'triton'))"
    assert run_python("-c", program).startswith("its kernels cannot be imported: ")


def test_without_the_interpreter_it_is_for_cuda_alone():
    program = (
        "from alibi_attention.backends.triton.attend import capability; c = capability(); print(c.devices, c.auto)"
    )
    assert run_python("-c", program) == "('cuda',) True\n"

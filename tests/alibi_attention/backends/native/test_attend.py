from __future__ import annotations

import ctypes
import platform
import subprocess
from functools import partial

import pytest
import torch

import alibi_attention
from alibi_attention import alibi_slopes, attention
from alibi_attention.backends.native import library as native_library
from alibi_attention.backends.native.attend import _BLOCK

FP32_ROUNDING = 2.0**-24  # relative, of one number
FP32_ATOL = 1e-5  # output and gradients of standard normal inputs, against fp64
attend = partial(attention, backend="native")


def visited_blocks(output):
    """Number of key blocks that each block of queries visited, [heads, query blocks]; query 0 stands at key 0."""
    saved = dict(zip(output.grad_fn.names, output.grad_fn.saved_tensors, strict=True))
    first_block_HN = saved["first_block"]
    return torch.arange(1, first_block_HN.shape[1] + 1) - first_block_HN


def test_it_runs_wherever_the_suite_runs():
    """A machine without a compiler must not pass in silence."""
    capability = next(capability for capability in alibi_attention.backends() if capability.name == "native")
    assert capability.usable, capability.reason


def test_a_steep_head_visits_a_constant_number_of_blocks(make_inputs):
    q, k, v, _ = make_inputs(1, 2048, 8, 64)
    visited_HN = visited_blocks(attend(q.requires_grad_(), k, v, alibi_slopes=alibi_slopes(8)))
    assert visited_HN[0].max() <= 3  # slope 1/2: no key past 100 tokens or so
    assert (visited_HN[:4].max(dim=1).values <= 16).all()
    assert torch.equal(visited_HN[7], torch.arange(1, 33))  # slope 1/256: all of them


def test_eps_0_visits_every_block(make_inputs):
    q, k, v, _ = make_inputs(1, 1024, 8, 64)
    visited_HN = visited_blocks(attend(q.requires_grad_(), k, v, alibi_slopes=alibi_slopes(8), horizon_eps=0.0))
    assert (visited_HN == torch.arange(1, 17)).all()


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_slope_that_does_not_fall_has_no_horizon(make_inputs, slope):
    q, k, v, _ = make_inputs(1, 512, 1, 16)
    output = attend(q.requires_grad_(), k, v, alibi_slopes=torch.tensor([slope]))
    assert (visited_blocks(output) == torch.arange(1, 9)).all()
    exact = attention(*(x.double() for x in (q, k, v)), alibi_slopes=torch.tensor([slope]), backend="reference")
    # The far keys count, whose bias is 256: fp32 rounds their scores by 2^-24 of that, and their weights with it.
    rounding = FP32_ROUNDING * abs(slope) * 512
    assert (output - exact).abs().max() <= FP32_ATOL + 2 * rounding * v.abs().max()


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_nan_is_never_past_the_horizon(make_inputs, which):
    q, k, v, _ = make_inputs(1, 1024, 2, 16)
    {"q": q, "k": k}[which][0, 3, 0, 5] = torch.nan
    output = attend(q, k, v, alibi_slopes=torch.tensor([2.0, 2.0]))
    lost = output.isnan().any(dim=-1)[0]
    assert not lost[:3].any()
    assert not lost[:, 1].any()
    assert lost[3:, 0].all() if which == "k" else lost[3, 0]


def test_backward_skips_what_forward_skipped(make_inputs):
    """A key that no query visited gets a gradient of exactly 0 from it; with eps 0.5 that is most of them."""
    q, k, v, _ = make_inputs(1, 1024, 1, 16)
    k, v = k.requires_grad_(), v.requires_grad_()
    output = attend(q, k, v, alibi_slopes=torch.tensor([0.5]), horizon_eps=0.5)
    visited = visited_blocks(output)[0, -1].item()
    assert visited < 4
    grad_k, grad_v = torch.autograd.grad(output[:, -_BLOCK:].sum(), (k, v))
    seen = 1024 - visited * _BLOCK
    assert grad_k[:, :seen].abs().max() == grad_v[:, :seen].abs().max() == 0.0
    assert (grad_v[:, seen:].abs().sum(dim=(0, 2, 3)) > 0).all()


def test_the_same_bits_on_any_number_of_threads_and_again(make_inputs, forward_backward):
    inputs = make_inputs(2, 333, 5, 24)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(forward_backward(partial(attend, alibi_slopes=alibi_slopes(5)), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_chunk_far_beyond_the_keys_loses_no_digits(make_inputs, forward_backward):
    """A bias of -2^20 / 2 for every key is a shift of the row; left in, it would leave scores two digits."""
    inputs = make_inputs(1, 70, 2, 16, keys=200)
    arguments = {"alibi_slopes": torch.tensor([0.5, 0.01]), "query_offset": 2**20}
    results = forward_backward(partial(attend, **arguments), inputs)
    exact = forward_backward(partial(attention, backend="reference", **arguments), inputs, torch.float64)
    assert max((x - y).abs().max() for x, y in zip(results, exact, strict=True)) < FP32_ATOL


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags name x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_older_processors_get_the_same_attention(tmp_path, monkeypatch, make_inputs, forward_backward, processor):
    """Vectors of 4 and of 8 lanes; this machine's own width is what every other test runs on."""
    flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in native_library._FLAGS]
    library = tmp_path / "native.so"
    subprocess.run(["c++", *flags, "-fPIC", "-shared", native_library._SOURCES[0], "-o", library], check=True)
    inputs = make_inputs(2, 150, 3, 40)
    exact = forward_backward(
        partial(attention, alibi_slopes=alibi_slopes(3), backend="reference"), inputs, torch.float64
    )
    monkeypatch.setattr(native_library, "load_library", lambda: (ctypes.CDLL(str(library)), ""))
    results = forward_backward(partial(attend, alibi_slopes=alibi_slopes(3)), inputs)
    assert max((x - y).abs().max() for x, y in zip(results, exact, strict=True)) < FP32_ATOL

"""The promise of horizon.py, held against the kernels that find horizons themselves, and each of their margins."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess

import pytest
import torch

from alibi_attention import attention, horizon
from alibi_attention.backends.native import library as native_library
from alibi_attention.backends.native.attend import _BLOCK
from alibi_attention.backends.triton import attend as triton_kernel
from alibi_attention.backends.triton import forward as triton_forward
from alibi_attention.backends.triton import tiles as triton_tiles
from alibi_attention.backends.triton.geometry import make_geometry
from tests.alibi_attention.every_backend.horizon_inputs import (
    EPS,
    FP64_SUM_ERROR,
    INPUTS,
    SLOPES,
    Call,
    beyond_the_keys,
    largest_loss,
    lossy_sums,
    tight,
    underflowing_keys,
    underflowing_queries,
)
from tests.support.device import DEVICE, ON_GPU

# Where a block of 64 keys ends that the last query may leave out, and a window of the folded bias begins.
DISTANCE = 321
# Of what the proof allows: a horizon in whole keys gives one of them away.
LEAST_OF_EPS = 0.8


def first_keys_of_native(call):
    """What the C++ kernel visited, as it stores it for its backward pass."""
    output = attend_to_keys(call, "native")
    first_blocks_HN = dict(zip(output.grad_fn.names, output.grad_fn.saved_tensors, strict=True))["first_block"]
    return spread(first_blocks_HN.unflatten(1, (len(call.q), -1)).transpose(0, 1) * _BLOCK, _BLOCK, call)


def first_keys_of_folded(call):
    """What the calls of the folded bias are shown; those in causal mode see all."""
    first_keys_HQ = torch.zeros(call.q.shape[2], call.q.shape[1], dtype=torch.int64)
    for heads, parts in attend_to_keys(call, "folded").grad_fn.groups:
        for part in parts:
            for block in range(part.blocks):
                first = part.first_query + block * part.queries
                first_keys_HQ[heads, first : first + part.queries] = part.first_key + block * part.queries
    return first_keys_HQ.expand(len(call.q), -1, -1)


def first_keys_of_triton(call):
    """What the Triton kernel visits, as it stores it for its backward pass."""
    q, k, slopes = (x.to(DEVICE) for x in (call.q, call.k, call.slopes))
    block = triton_tiles.block_tokens(q.dtype)
    geometry, documents = make_geometry(q, k, None, call.query_offset, block)
    _, _, first_keys_GN = triton_kernel.run_forward(q, k, k, slopes, geometry, documents, call.softmax_scale, call.eps)
    return spread(first_keys_GN.cpu().unflatten(0, (len(q), -1)), block, call)


def attend_to_keys(call, backend):
    arguments = {"alibi_slopes": call.slopes, "softmax_scale": call.softmax_scale, "query_offset": call.query_offset}
    return attention(
        call.q.clone().requires_grad_(), call.k, call.k, backend=backend, horizon_eps=call.eps, **arguments
    )


def spread(first_keys_BHN, block, call):
    return first_keys_BHN.repeat_interleave(block, dim=-1)[..., : call.q.shape[1]]


FIRST_KEYS = {"native": first_keys_of_native, "folded": first_keys_of_folded, "triton": first_keys_of_triton}
KERNELS = [
    "native",
    "folded",
    pytest.param(
        "triton", marks=[] if ON_GPU or triton_tiles.INTERPRETED else pytest.mark.skip("needs the interpreter")
    ),
]


@contextlib.contextmanager
def flushed_to_zero():
    """Numbers too small for fp32's full precision are 0 on this thread, which is then the only one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def loss_by(kernel, call):
    with flushed_to_zero():
        first_keys_BHQ = FIRST_KEYS[kernel](call)
    loss, has_kept = largest_loss(call, first_keys_BHQ)
    assert has_kept
    return loss


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [2.0**-24, 0.5])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_row_loses_more_than_eps(kernel, inputs, eps):
    for dtype in (torch.float32,) if kernel == "triton" else (torch.float32, torch.bfloat16):  # it takes seconds
        q, k = (x.to(dtype) for x in INPUTS[inputs](200))
        assert loss_by(kernel, Call(q, k, SLOPES, eps)) <= eps + FP64_SUM_ERROR


CALLS = {
    "nothing to spare": lambda: tight(1e-4, DISTANCE, 15.0, num_heads=4),
    "rounded scores": lambda: tight(0.1, DISTANCE, 2.0**22),
    "rounded bias": lambda: beyond_the_keys(0.04, 129),
    "lossy sums": lambda: lossy_sums(0.1, DISTANCE),
    "underflowing queries": underflowing_queries,
    "underflowing keys": underflowing_keys,
}


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", CALLS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_row_loses_more_than_eps_where_that_is_hardest(kernel, inputs):
    call = CALLS[inputs]()
    assert loss_by(kernel, call) <= call.eps + FP64_SUM_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_promise_is_tight_where_the_inequalities_are_equations(kernel):
    """With a tenth less than eps, all far keys are left out; else the inputs above would show nothing."""
    call = tight(-0.1, DISTANCE, 15.0, num_heads=4)
    assert LEAST_OF_EPS * EPS < loss_by(kernel, call) <= EPS


MARGINS = {
    "native": [
        ("constexpr float kNormMargin = 1.0f + 0x1p-12f", "constexpr float kNormMargin = 0.5f", "nothing to spare"),
        ("constexpr float kNormMargin = 1.0f + 0x1p-12f", "constexpr float kNormMargin = 1.0f", "rounded scores"),
        ("constexpr float kTinySquares = 0x1p-118f", "constexpr float kTinySquares = 0.0f", "underflowing queries"),
    ],
    "folded": [
        ("NORM_MARGIN", 0.5, "nothing to spare"),
        ("NORM_MARGIN", 1.0, "rounded scores"),
        ("NORM_FLOOR", 0.0, "underflowing queries"),
    ],
    "triton": [
        ("_NORM_MARGIN", 0.5, "nothing to spare"),
        ("_NORM_MARGIN", 1.0, "lossy sums"),
        ("_NORM_FLOOR", 0.0, "underflowing queries"),
        ("_ROUNDING", 0.0, "rounded bias"),
    ],
}


@pytest.mark.parametrize(("written", "weaker", "inputs"), MARGINS["native"])
def test_every_margin_of_the_native_kernel_is_needed(monkeypatch, tmp_path, written, weaker, inputs):
    text, header = (path.read_text() for path in native_library._SOURCES)
    assert text.count(written) == 1
    (tmp_path / native_library._SOURCES[0].name).write_text(text.replace(written, weaker))
    (tmp_path / native_library._SOURCES[1].name).write_text(header)
    library = tmp_path / "native.so"
    subprocess.run(
        ["c++", *native_library._FLAGS, "-fPIC", "-shared", tmp_path / "native.cpp", "-o", library], check=True
    )
    monkeypatch.setattr(native_library, "load_library", lambda: (ctypes.CDLL(str(library)), ""))
    assert_broken("native", inputs)


@pytest.mark.parametrize(("name", "weaker", "inputs"), MARGINS["folded"])
def test_every_margin_of_find_horizons_is_needed(monkeypatch, name, weaker, inputs):
    monkeypatch.setattr(horizon, name, weaker)
    assert_broken("folded", inputs)


@pytest.mark.skipif(not triton_tiles.INTERPRETED, reason="a compiled kernel keeps its constants")
@pytest.mark.parametrize(("name", "weaker", "inputs"), MARGINS["triton"])
def test_every_margin_of_the_triton_kernel_is_needed(monkeypatch, name, weaker, inputs):
    monkeypatch.setattr(triton_forward, name, type(getattr(triton_forward, name))(weaker))
    assert_broken("triton", inputs)


def assert_broken(kernel, inputs):
    """The check that holds above fails with the margin that was weakened."""
    call = CALLS[inputs]()
    assert loss_by(kernel, call) > call.eps + FP64_SUM_ERROR

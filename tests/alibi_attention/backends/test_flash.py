"""What is special to flash-attn, on a GPU where there is one; what every back end owes: every_backend/."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import alibi_attention
from alibi_attention import alibi_slopes, attention, backends, local_slopes, resolve_backend
from alibi_attention.backends.flash import find_version_fault

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where flash_attn_on_cpu.py has it interpreted
DTYPES = [torch.float16, torch.bfloat16]
ERROR_FACTOR_16_BIT = 2.0  # times the relative error of plain SDPA in the same type
# Relative to the output, whose terms are as large. For one token dq and dk are 0: two fp32 sums of up to 128 products
# cancel, each of which may be rounded by 2^-24. 2e-7 was seen; without one of the sums it is 0.7.
FP32_SUMS_RELATIVE_ERROR = 128 * 2.0**-24

attend_flash = partial(attention, backend="flash")
attend_ref = partial(attention, backend="reference")


@pytest.fixture
def check_against_fp64(forward_backward, relative_errors):
    """Output and gradients may err by as much as twice what plain SDPA does without documents, offset and bias."""

    def check(inputs, **arguments):
        inputs = [x.to(DEVICE) for x in inputs]
        exact = forward_backward(partial(attend_ref, **arguments), inputs, torch.float64)
        errors = relative_errors(forward_backward(partial(attend_flash, **arguments), inputs), exact)
        plain = forward_backward(plain_sdpa, square(inputs))
        plain_exact = forward_backward(partial(attend_ref, alibi_slopes=None), square(inputs), torch.float64)
        allowed = [ERROR_FACTOR_16_BIT * error for error in relative_errors(plain, plain_exact)]
        for name, error, bound in zip(("output", "dq", "dk", "dv"), errors, allowed, strict=True):
            assert error <= bound + FP32_SUMS_RELATIVE_ERROR, f"{name}: {error:.1e} > {bound:.1e}"

    return check


def square(inputs):
    """As many queries as keys: the last ones."""
    queries = inputs[0].shape[1]
    return [x[:, -queries:].contiguous() for x in inputs]


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def slopes_of(num_heads):
    return alibi_slopes(num_heads).to(DEVICE)


def test_flash_attn_is_installed_for_this_suite():
    (flash,) = (backend for backend in backends() if backend.name == "flash")
    assert flash.reason == ""
    assert DEVICE in flash.devices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seq_length", "num_heads", "head_dim"), [(1, 2, 64), (97, 12, 64), (17, 20, 64), (130, 1, 128), (33, 3, 20)]
)
def test_output_and_gradients_against_fp64(make_inputs, check_against_fp64, seq_length, num_heads, head_dim, dtype):
    check_against_fp64(make_inputs(1, seq_length, num_heads, head_dim, dtype=dtype), alibi_slopes=slopes_of(num_heads))


@pytest.mark.parametrize(
    ("slopes", "dtype"), [(slopes_of(3), torch.float16), (None, torch.bfloat16)], ids=["alibi", "no bias"]
)
def test_documents_with_empty_and_one_token_ones(make_inputs, check_against_fp64, slopes, dtype):
    cu_seqlens = torch.tensor([0, 0, 1, 2, 40, 40, 60, 90, 119, 120], dtype=torch.int32, device=DEVICE)
    check_against_fp64(make_inputs(2, 60, 3, 64, dtype=dtype), alibi_slopes=slopes, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("query_offset", [None, 0, 20])
def test_fewer_queries_than_keys(make_inputs, check_against_fp64, query_offset):
    inputs = make_inputs(2, 41, 2, 64, keys=97, dtype=torch.bfloat16)
    check_against_fp64(inputs, alibi_slopes=slopes_of(2), query_offset=query_offset)


def test_trap_5_a_chunk_of_queries_gets_the_rows_of_the_whole(make_inputs, forward_backward):
    """The kernel's bias counts from the first key, or from the last: neither may reach the output."""
    q, k, v, _ = (x.to(DEVICE) for x in make_inputs(1, 96, 12, 64, dtype=torch.float16))
    whole = attend_flash(q, k, v, alibi_slopes=slopes_of(12)).float()
    exact = attend_ref(*(x.double() for x in (q, k, v)), alibi_slopes=slopes_of(12))
    for start, end in ((0, 1), (0, 40), (40, 80), (95, 96)):
        chunk = attend_flash(q[:, start:end], k, v, alibi_slopes=slopes_of(12), query_offset=start).float()
        # The same products in other blocks: rounded otherwise, and no further from the truth than the whole is.
        bound = ERROR_FACTOR_16_BIT * (whole - exact).abs().max()
        assert (chunk - exact[:, start:end]).abs().max() <= bound


def test_trap_2_heads_of_tensor_ranks_equal_the_whole_bit_for_bit(make_inputs, forward_backward):
    inputs = [x.to(DEVICE) for x in make_inputs(1, 17, 12, 64, dtype=torch.bfloat16)]
    torch.use_deterministic_algorithms(True)
    try:
        whole = forward_backward(partial(attend_flash, alibi_slopes=slopes_of(12)), inputs)
        shards = []
        for start in (0, 3, 6, 9):
            local = [x[:, :, start : start + 3] for x in inputs]
            slopes = local_slopes(12, start, 3).to(DEVICE)
            shards.append(forward_backward(partial(attend_flash, alibi_slopes=slopes), local))
    finally:
        torch.use_deterministic_algorithms(False)
    for full, *parts in zip(whole, *shards, strict=True):
        assert torch.equal(torch.cat(parts, dim=2), full)


@pytest.mark.parametrize("view", ["head_dim_outermost", "packed_qkv", "every_second_channel", "transposed_batch"])
def test_strided_inputs(forward_backward, view):
    make = partial(torch.randn, dtype=torch.float16, device=DEVICE)
    q, k, v = {
        "head_dim_outermost": lambda: make(3, 32, 2, 60, 3).permute(0, 2, 3, 4, 1),
        "packed_qkv": lambda: make(2, 60, 3, 3, 32).unbind(2),
        "every_second_channel": lambda: make(3, 2, 60, 3, 64)[..., ::2],
        "transposed_batch": lambda: make(3, 60, 2, 3, 32).transpose(1, 2),
    }[view]()
    assert not q.is_contiguous()
    every_second_slope = slopes_of(6)[::2]
    check_strides_do_not_matter(forward_backward, [q, k, v, make(2, 60, 3, 32)], every_second_slope)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 60, 120]], ids=["rows", "documents"])
def test_a_gradient_that_is_strided_otherwise_than_the_output(make_inputs, forward_backward, cu_seqlens):
    q, k, v, _ = (x.half().to(DEVICE) for x in make_inputs(2, 60, 3, 32))
    every_second_head = torch.randn(2, 60, 6, 32, dtype=torch.float16, device=DEVICE)[:, :, ::2]
    documents = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    check_strides_do_not_matter(forward_backward, [q, k, v, every_second_head], slopes_of(3), cu_seqlens=documents)


def check_strides_do_not_matter(forward_backward, inputs, slopes, **arguments):
    attend = partial(attend_flash, alibi_slopes=slopes, **arguments)
    attend_contiguous = partial(attend_flash, alibi_slopes=slopes.contiguous(), **arguments)
    results = forward_backward(attend, inputs)
    contiguous = forward_backward(attend_contiguous, [x.contiguous() for x in inputs])
    assert all(torch.equal(x, y) for x, y in zip(results, contiguous, strict=True))


def test_dropout_keeps_exact_weights_and_drops_the_rest(make_inputs):
    dtype = torch.float16
    q, k, _, _ = (x.to(DEVICE) for x in make_inputs(1, 64, 12, 64, dtype=dtype))
    identity = torch.eye(64, dtype=dtype, device=DEVICE)[None, :, None].expand_as(k)
    dropout_p = 0.25
    kept = attend_flash(q, k, identity, alibi_slopes=slopes_of(12), dropout_p=dropout_p).double() * (1 - dropout_p)
    weights = attend_ref(q.double(), k.double(), identity.double(), alibi_slopes=slopes_of(12))
    is_kept, visible = kept != 0, weights > torch.finfo(dtype).tiny
    # The weight is rounded, and so is the output.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(kept[is_kept & visible], weights[is_kept & visible], rtol=2 * eps, atol=eps**2)
    assert (is_kept & visible).sum().item() / visible.sum().item() == pytest.approx(1 - dropout_p, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ({}, r"dtype torch\.float32 is not one of torch\.bfloat16, torch\.float16"),
        ({"dtype": torch.float16, "head_dim": 264}, "head_dim 264 is more than 256"),
        ({"dtype": torch.float16, "query_offset": 1}, "it cannot place queries beyond the last key"),
    ],
)
def test_a_call_that_it_cannot_do_is_refused(arguments, refusal):
    q = torch.zeros(1, 3, 2, arguments.pop("head_dim", 64), dtype=arguments.pop("dtype", torch.float32), device=DEVICE)
    with pytest.raises(RuntimeError, match=f"backend='flash' cannot run: flash: {refusal}"):
        attend_flash(q, q, q, alibi_slopes=slopes_of(2), **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_never_takes_the_interpreter(dtype):
    assert resolve_backend("flash", "cpu", dtype, 64) == "flash"
    assert resolve_backend("auto", "cpu", dtype, 64) != "flash"


@pytest.mark.parametrize("version", ["2.4.0", "2.8.3", "2.8.3.post2+sm90.hd64", "2.10.1"])
def test_versions_that_take_slopes(version):
    assert find_version_fault(version) == ""


@pytest.mark.parametrize("version", ["1.0.9", "2.3.6", "3.0.0b1", "4.0.0"])
def test_trap_5_versions_that_take_none_are_named(version):
    assert find_version_fault(version) == f"flash-attn {version} is installed: ALiBi slopes need 2.4 or a later 2.x"


WITHOUT_FLASH_ATTN = """
import sys
sys.modules["flash_attn"] = None  # what Python itself notes to stop an import
from alibi_attention import backends, resolve_backend
print([backend.reason for backend in backends() if backend.name == "flash"])
print(resolve_backend("auto", "cpu", __import__("torch").bfloat16, 64) != "flash")
resolve_backend("flash", "cpu", __import__("torch").bfloat16, 64)
"""


def test_without_flash_attn_the_rest_works_and_the_reason_is_given():
    source_root = Path(alibi_attention.__file__).parents[1]
    command = [sys.executable, "-c", WITHOUT_FLASH_ATTN]
    done = subprocess.run(command, cwd=source_root, capture_output=True, text=True, check=False)
    reason = "flash-attn cannot be imported: import of flash_attn halted; None in sys.modules"
    assert done.stdout.splitlines() == [str([reason]), "True"]
    assert done.stderr.splitlines()[-1] == f"RuntimeError: backend='flash' cannot run: flash: {reason}"

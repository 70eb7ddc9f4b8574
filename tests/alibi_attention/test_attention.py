from __future__ import annotations

import logging

import pytest
import torch

import alibi_attention
from alibi_attention import PackedDocuments, alibi_slopes, attention, backends, resolve_backend
from alibi_attention.attention import _resolve

ORDER = ["native", "triton", "flash", "folded", "sdpa", "reference", "unfused"]


def test_the_package_exports_its_promises():
    functions = {"alibi_slopes", "attention", "backends", "local_slopes", "resolve_backend", "split_qkv"}
    assert set(alibi_attention.__all__) == {"PackedDocuments", *functions}


def test_backends_are_listed_in_the_order_of_auto():
    assert [backend.name for backend in backends()] == ORDER
    assert all(backend.usable != bool(backend.reason) and backend.exactness for backend in backends())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_takes_the_first_that_can(dtype):
    able = [b.name for b in backends() if b.usable and b.auto and "cpu" in b.devices and dtype in b.dtypes]
    assert resolve_backend("auto", "cpu", dtype, 64, dropout=False) == able[0]
    assert resolve_backend("auto", "cpu", dtype, 10_000, dropout=True) == "sdpa"
    for name in ("reference", "unfused"):  # by name alone: sdpa can do all that they can
        assert resolve_backend(name, torch.device("cpu"), dtype, 64, dropout=True) == name


def test_auto_passes_over_an_interpreter_that_could_do_it(caplog):
    _resolve.cache_clear()
    (flash,) = (backend for backend in backends() if backend.name == "flash")
    assert flash.auto != ("cpu" in flash.devices)
    with caplog.at_level(logging.INFO, logger="alibi_attention"):
        assert resolve_backend("auto", "cpu", torch.float16, 64, dropout=True) == "sdpa"
    refusal = flash.reason or ("device cpu is not" if flash.auto else "it runs in an interpreter here, by name alone")
    assert f"not flash: {refusal}" in caplog.records[0].getMessage()


def test_auto_says_its_choice_once(caplog, make_inputs):
    _resolve.cache_clear()
    q, k, v, _ = make_inputs(1, 3, 2, 4)
    with caplog.at_level(logging.INFO, logger="alibi_attention"):
        for _ in range(3):
            attention(q, k, v, alibi_slopes=alibi_slopes(2))
        attention(q, k, v, alibi_slopes=alibi_slopes(2), backend="reference")
    (record,) = caplog.records
    chosen = resolve_backend("auto", "cpu", torch.float32, 4)
    assert record.getMessage().startswith(f"attention back end for cpu, torch.float32, head_dim 4: {chosen}")


def test_a_back_end_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="backend='sdpa' cannot run: sdpa: device mps is not one of cpu, cuda"):
        resolve_backend("sdpa", "mps", torch.float32, 64, dropout=False)
    with pytest.raises(
        RuntimeError, match=r"'auto' cannot run: .*; sdpa: dtype torch\.int64 is not .*; reference: dtype"
    ):
        resolve_backend("auto", "cpu", torch.int64, 64, dropout=False)


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="backend='flahs': must be one of auto, " + ", ".join(ORDER) + "$"):
        resolve_backend("flahs", "cpu", torch.float32, 64, dropout=False)


def test_trap_2_slopes_that_were_cast_are_refused(make_inputs):
    q, k, v, _ = make_inputs(1, 3, 2, 4)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=rf"alibi_slopes: must be torch\.float32 and never cast, got {cast}"):
            attention(q, k, v, alibi_slopes=alibi_slopes(2).to(cast))


BAD_ARGUMENTS = {
    "causal=False: must be True; ALiBi's bias": {"causal": False},
    r"q_BSHK: must be \[batch, queries, heads": {"q_BSHK": torch.zeros(3, 2, 4)},
    r"q_BSHK: must be .* got \(2, 0, 2, 4\)": {"q_BSHK": torch.zeros(2, 0, 2, 4)},
    r"k_BSHK: must be \[2, keys, 2, 4\] .* got \(2, 3, 1, 4\)": {"k_BSHK": torch.zeros(2, 3, 1, 4)},
    r"k_BSHK: must be .* got \(2, 3, 8\)": {"k_BSHK": torch.zeros(2, 3, 8)},
    r"v_BSHK: must be \(2, 3, 2, 4\) .* got \(2, 3, 2, 5\)": {"v_BSHK": torch.zeros(2, 3, 2, 5)},
    r"v_BSHK: must be torch\.float32 on cpu": {"v_BSHK": torch.zeros(2, 3, 2, 4, dtype=torch.bfloat16)},
    r"alibi_slopes: must be \[2\], one for each head": {"alibi_slopes": alibi_slopes(4)},
    "alibi_slopes: must be on cpu": {"alibi_slopes": torch.zeros(2, device="meta")},
    "alibi_slopes: must not require a gradient": {"alibi_slopes": torch.zeros(2, requires_grad=True)},
    r"softmax_scale=0\.0: must be above 0": {"softmax_scale": 0.0},
    r"softmax_scale=-0\.5: must be above 0": {"softmax_scale": -0.5},
    r"softmax_scale=nan: must be above 0": {"softmax_scale": float("nan")},
    r"dropout_p=1\.0: must be in \[0, 1\)": {"dropout_p": 1.0},
    r"horizon_eps=1\.0: must be in \[0, 1\)": {"horizon_eps": 1.0},
    "query_offset=-1: must be 0 or more": {"query_offset": -1},
    "query_offset=-2: must be 0 or more": {"q_BSHK": torch.zeros(2, 5, 2, 4)},
    r"cu_seqlens: must be torch\.int32": {"cu_seqlens": torch.tensor([0, 6])},
    "cu_seqlens: needs as many queries as keys": {"cu_seqlens": torch.tensor([0, 6]).int(), "query_offset": 3},
    "cu_seqlens: must rise from 0 to the batch's 6 tokens": {"cu_seqlens": torch.tensor([0, 3]).int()},
    "cu_seqlens: must be of the batch's 6 tokens on cpu, got of 3": {
        "cu_seqlens": PackedDocuments(torch.tensor([0, 3]).int(), 3)
    },
    "cu_seqlens: must be .* got of 6 tokens on meta": {
        "cu_seqlens": PackedDocuments(torch.tensor([0, 6]).int(), 6, torch.device("meta"))
    },
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_in_one_line(message):
    good = {name: torch.zeros(2, 3, 2, 4) for name in ("q_BSHK", "k_BSHK", "v_BSHK")}
    arguments = {**good, "alibi_slopes": alibi_slopes(2), **BAD_ARGUMENTS[message]}
    with pytest.raises(ValueError, match=message) as raised:
        attention(**arguments)
    assert "\n" not in str(raised.value)

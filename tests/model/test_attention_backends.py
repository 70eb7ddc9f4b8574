"""Heads over 1, 2 and 4 tensor ranks through every back end of this machine: a rank's slopes are those of its heads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import tests.support.flash_attn_on_cpu  # noqa: F401 - before alibi_attention; this file is imported in ranks
from alibi_attention import PackedDocuments, backends
from alibi_attention.backend import Capability
from megalibi.model.attention import SelfAttention
from megalibi.model.positions import Alibi, build_position_method
from megalibi.parallel import ALONE, Layout
from tests.support.models import make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import assert_close, full_grad, load_full, randn, relative_error, tensor_group

BACKENDS = {backend.name: backend for backend in backends() if backend.usable and "cpu" in backend.devices}
HEAD_DIM, SEQ_LENGTH = 16, 19
DOCUMENTS = [0, 7, 19]
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""fp32: sums in another order. bf16: partial sums of the ranks are rounded. Slopes of other heads are off by 0.2."""


def get_dtype(backend: Capability) -> torch.dtype:
    return torch.float32 if torch.float32 in backend.dtypes else torch.bfloat16


def _attend(backend: str, num_heads: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and full gradients of an attention layer, on one row and on its documents."""
    group = tensor_group()
    hidden_size = num_heads * HEAD_DIM
    model = make_model(num_attention_heads=num_heads, hidden_size=hidden_size, attention_backend=backend)
    positions = build_position_method(model, group)
    attention = SelfAttention(model, 0, positions, layout=Layout(group)).to(dtype)
    results = {}
    for kind, documents in (
        ("row", None),
        ("documents", PackedDocuments(torch.tensor(DOCUMENTS, dtype=torch.int32), SEQ_LENGTH)),
    ):
        attention.zero_grad()
        load_full(attention.qkv.weight, randn(1, 3 * hidden_size, hidden_size) / hidden_size**0.5, group)
        load_full(attention.proj.weight, randn(2, hidden_size, hidden_size) / hidden_size**0.5, group)
        x = randn(3, 1, SEQ_LENGTH, hidden_size, dtype=dtype).requires_grad_()
        output = attention(x, None, positions.score_bias(SEQ_LENGTH, x.device), documents=documents)
        output.backward(randn(4, 1, SEQ_LENGTH, hidden_size, dtype=dtype))
        assert x.grad is not None
        results[f"{kind}: output"], results[f"{kind}: gradient of x"] = output.detach(), x.grad
        for name, parameter in attention.named_parameters():
            results[f"{kind}: gradient of {name}"] = full_grad(parameter, group).clone()
    return results


@torch.no_grad()
def _attend_scaled(backend: str, dtype: torch.dtype, factor: float, *, scale_alibi: bool = False) -> Tensor:
    """The output of an attention layer of 4 heads whose slopes are scaled at evaluation, or by the model."""
    hidden_size = 4 * HEAD_DIM
    fields = {"num_attention_heads": 4, "hidden_size": hidden_size, "attention_backend": backend}
    model = make_model(**fields, scale_alibi=scale_alibi)
    positions = Alibi(model, ALONE)
    positions.scale_slopes(factor)
    attention = SelfAttention(model, 0, positions, layout=Layout(ALONE)).to(dtype)
    for seed, parameter in enumerate(attention.parameters()):
        parameter.copy_(randn(seed, *parameter.shape) / hidden_size**0.5)
    x = randn(3, 1, SEQ_LENGTH, hidden_size, dtype=dtype)
    return attention(x, None, positions.score_bias(SEQ_LENGTH, x.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_has_scaled_slopes(backend: str) -> None:
    """A quarter is what a head dimension of 16 makes of the slopes of a model with ``scale_alibi``, in every bit."""
    dtype = get_dtype(BACKENDS[backend])
    scaled = _attend_scaled(backend, dtype, 1 / 4)
    assert torch.equal(scaled, _attend_scaled(backend, dtype, 1.0, scale_alibi=True))
    assert relative_error(_attend_scaled(backend, dtype, 1.0), scaled) > 2 * RELATIVE_ERROR[dtype]


@cache
def attend_alone(backend: str, num_heads: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return run_on_ranks(1, _attend, backend, num_heads, dtype)[0]


@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
@pytest.mark.parametrize("num_heads", [12, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_2_tensor_ranks_equal_one_through_every_back_end(
    backend: str, num_heads: int, tensor_parallel_size: int
) -> None:
    dtype = get_dtype(BACKENDS[backend])
    alone = attend_alone(backend, num_heads, dtype)
    for result in run_on_ranks(tensor_parallel_size, _attend, backend, num_heads, dtype):
        for name, expected in alone.items():
            assert_close(result[name], expected, RELATIVE_ERROR[dtype], name)


@pytest.mark.parametrize("num_heads", [12, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_equals_the_reference(backend: str, num_heads: int) -> None:
    dtype = get_dtype(BACKENDS[backend])
    expected = attend_alone("reference", num_heads, dtype)
    for name, result in attend_alone(backend, num_heads, dtype).items():
        assert_close(result, expected[name], RELATIVE_ERROR[dtype], name)

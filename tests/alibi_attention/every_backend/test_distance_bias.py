"""A learned bias by distance (T5's), through every back end that takes one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from alibi_attention import alibi_slopes, attention, backends, resolve_backend

BACKENDS = [b for b in backends() if b.usable and b.distance_bias and "cpu" in b.devices]
FP64_RELATIVE = 1e-13
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
MAX_PEAK_MIB_16384 = 320  # some matrices of 256 x 16384; one S x S fp32 matrix of one head would be 1024

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def attend_slowly(q, k, v, bias_HD, document_of):
    """The definition, query by query."""
    rows = []
    for i in range(q.shape[1]):
        keys = [j for j in range(i + 1) if document_of[j] == document_of[i]]
        distances = torch.tensor([i - j for j in keys])
        scores_BHT = torch.einsum("bhk,bthk->bht", q[:, i], k[:, keys]) / q.shape[-1] ** 0.5 + bias_HD[:, distances]
        rows.append(torch.einsum("bht,bthk->bhk", scores_BHT.softmax(-1), v[:, keys]))
    return torch.stack(rows, dim=1)


def make(length: int, dtype: torch.dtype, batch: int = 2):
    random = torch.Generator().manual_seed(length)
    qkv = [torch.randn(batch, length, 3, 8, generator=random, dtype=torch.float64).to(dtype) for _ in range(3)]
    bias = torch.randn(3, length + 5, generator=random, dtype=torch.float64)  # more distances than there are
    return [x.requires_grad_() for x in qkv], bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()


def output_and_gradients(attend, qkv, bias):
    output = attend(*qkv, bias)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [*qkv, bias], upstream)]


def relative_errors(results, exact):
    return [((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(results, exact, strict=True)]


@pytest.mark.parametrize("documents", [None, [0, 97, 97 + 3, 300]], ids=["row", "documents"])
@every_backend
def test_output_and_all_gradients_equal_the_definition(backend, documents) -> None:
    length = 300  # two blocks of queries
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    ends = documents or [0, length]
    document_of = [sum(i >= end for end in ends) for i in range(length)]
    qkv, bias = make(length, torch.float64, batch=1)
    exact = output_and_gradients(lambda q, k, v, b: attend_slowly(q, k, v, b, document_of), qkv, bias)

    def attend(q, k, v, b):
        return attention(q, k, v, alibi_slopes=None, distance_bias=b, cu_seqlens=cu_seqlens, backend=backend.name)

    assert max(relative_errors(output_and_gradients(attend, qkv, bias), exact)) < FP64_RELATIVE
    for dtype, bound in RELATIVE_ERROR.items():
        cast = [x.detach().to(dtype).requires_grad_() for x in qkv]
        bias_fp32 = bias.detach().float().requires_grad_()
        assert max(relative_errors(output_and_gradients(attend, cast, bias_fp32), exact)) < bound


@every_backend
def test_slopes_as_a_distance_bias_are_alibi(backend) -> None:
    (q, k, v), _ = make(70, torch.float64)
    slopes = alibi_slopes(3)
    bias = -slopes.double()[:, None] * torch.arange(70)
    expected = attention(q, k, v, alibi_slopes=slopes, backend="reference")
    torch.testing.assert_close(
        attention(q, k, v, alibi_slopes=None, distance_bias=bias, backend=backend.name), expected
    )


@every_backend
def test_later_queries_alone_equal_those_of_the_whole(backend) -> None:
    (q, k, v), bias = make(70, torch.float64)
    whole = attention(q, k, v, alibi_slopes=None, distance_bias=bias, backend=backend.name)
    for offset, queries in ((0, 9), (30, 20), (69, 1)):
        part = q[:, offset : offset + queries]
        output = attention(part, k, v, alibi_slopes=None, distance_bias=bias, query_offset=offset, backend=backend.name)
        torch.testing.assert_close(output, whole[:, offset : offset + queries])


_MEASURE = """
import resource, torch
from alibi_attention import attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 16384, 1, 16).requires_grad_() for _ in range(3))
bias = torch.randn(1, 16384).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v, alibi_slopes=None, distance_bias=bias, backend="sdpa").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_linear_at_16384_tokens_forward_and_backward() -> None:
    # Tensors come from mmap: malloc's heap would keep what blocks of many sizes leave behind.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < MAX_PEAK_MIB_16384


def test_auto_takes_a_back_end_that_can_and_a_named_one_that_cannot_says_so() -> None:
    assert resolve_backend("auto", "cpu", torch.bfloat16, 64, bias="distance") == "sdpa"
    with pytest.raises(RuntimeError, match="backend='native' cannot run: native: it takes slopes alone"):
        resolve_backend("native", "cpu", torch.float32, 64, bias="distance")


BAD = {
    r"distance_bias: must be \[3, 70 or more distances\], got \(3, 69\)": {"distance_bias": torch.zeros(3, 69)},
    r"distance_bias: must be \[3, 70 or more distances\], got \(4, 70\)": {"distance_bias": torch.zeros(4, 70)},
    r"distance_bias: must be torch.float32 on cpu, got torch.bfloat16": {
        "distance_bias": torch.zeros(3, 70).bfloat16()
    },
    "distance_bias: goes in place of alibi_slopes": {"alibi_slopes": alibi_slopes(3)},
    "query_offset=1: with a distance_bias no query may stand beyond the last key": {"query_offset": 1},
    r"distance_bias: must be \[3, 100 or more": {"cu_seqlens": torch.tensor([0, 40, 140], dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_in_one_line(message) -> None:
    (q, k, v), _ = make(70, torch.float32)
    arguments = {"alibi_slopes": None, "distance_bias": torch.zeros(3, 75), **BAD[message]}
    with pytest.raises(ValueError, match=message) as raised:
        attention(q, k, v, **arguments)
    assert "\n" not in str(raised.value)

"""Every back end that runs here, in every type that it takes, and what its tests share.

Those that Triton's interpreter runs get small sizes. On a GPU (TEST_DEVICE=cuda) the types are bf16 and fp32, through
compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from alibi_attention import alibi_slopes, attention, backends
from alibi_attention.backend import Capability
from tests.support.device import DEVICE, ON_GPU

# ||x - x64|| / ||x64|| of output and gradients. In 16 bits a rounding step: rounding the result alone costs a quarter.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ERROR_FACTOR_16_BIT = 2.0  # times the largest error of plain SDPA in the same type
HERE = [capability for capability in backends() if capability.usable and DEVICE in capability.devices]
INTERPRETED = {capability.name for capability in HERE if not capability.auto}
# Kernels are compiled there for each type and head dimension: fp16 goes the way of bf16.
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else tuple(BOUNDS)
HEAD_DIM = 64 if ON_GPU else 16
fails_on_gpu = pytest.mark.xfail(ON_GPU, reason="on a GPU its fp32 errors are 6e-6 (README, limits)", strict=False)
every_backend = pytest.mark.parametrize("backend", HERE, ids=lambda backend: backend.name)
every_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            backend,
            dtype,
            id=f"{backend.name}-{str(dtype).removeprefix('torch.')}",
            marks=[fails_on_gpu] * ((backend.name, dtype) == ("folded", torch.float32)),
        )
        for backend in HERE
        for dtype in backend.dtypes
        if dtype in DTYPES
    ],
)
with_and_without_slopes = pytest.mark.parametrize("with_slopes", [True, False], ids=["alibi", "no bias"])
S_BY_S = ("reference", "unfused")
attend_ref = partial(attention, backend="reference")
randn = partial(torch.randn, device=DEVICE)


def slopes_of(num_heads: int) -> torch.Tensor:
    return alibi_slopes(num_heads).to(DEVICE)


def pick(backend: Capability, compiled, interpreted):
    return interpreted if backend.name in INTERPRETED else compiled


def best_dtype(backend: Capability) -> torch.dtype:
    return next(dtype for dtype in (DTYPES if ON_GPU else BOUNDS) if dtype in backend.dtypes)


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


@contextmanager
def skipping_what_its_build_lacks() -> Iterator[None]:
    """flash-attn may be built for some types and head dimensions alone, and says so when it is called."""
    try:
        yield
    except RuntimeError as error:
        if "flash attention build" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])

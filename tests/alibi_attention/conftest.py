from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.device import DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_inputs() -> Callable[..., list[torch.Tensor]]:
    """q, k, v and an upstream gradient of the output, from the standard normal distribution, on every device."""

    def make(batch, queries, num_heads, head_dim, *, keys=None, dtype=torch.float32):
        lengths = (queries, keys or queries, keys or queries, queries)
        return [torch.randn(batch, length, num_heads, head_dim).to(DEVICE, dtype) for length in lengths]

    return make


@pytest.fixture
def forward_backward() -> Callable[..., list[torch.Tensor]]:
    """Output, dq, dk, dv of an attention function, computed in the dtype asked for and returned in fp64."""

    def run(attend, inputs, dtype=None):
        *qkv, upstream = (x.to(dtype or x.dtype) for x in inputs)
        qkv = [x.detach().requires_grad_() for x in qkv]
        output = attend(*qkv)
        assert output.dtype == qkv[0].dtype
        gradients = torch.autograd.grad(output, qkv, upstream)
        return [x.detach().double() for x in (output, *gradients)]

    return run


@pytest.fixture
def relative_errors() -> Callable[..., list[float]]:
    """||x - y|| / ||y|| of output, dq, dk and dv; ||output|| stands in for a gradient that is smaller, or zero."""

    def measure(results, exact):
        at_least = exact[0].norm()
        pairs = zip(results, exact, strict=True)
        return [((x.double() - y).norm() / torch.maximum(y.norm(), at_least)).item() for x, y in pairs]

    return measure

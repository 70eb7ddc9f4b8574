from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalibi.parallel import linear, matmul

ROWS, INPUTS, OUTPUTS = 2048, 256, 1024
SLOWER_THAN_FP32 = 3.0
"""The most that products of 16 bits may take, in times of fp32; PyTorch alone takes 4 to 40 without instructions."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_and_their_gradients_are_those_of_fp64_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 5, 64), (48, 64), (48,)))
    grad = torch.randn(3, 5, 48).to(dtype)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    results = [linear(x, weight, bias), matmul(x, weight.T)]
    exact = [F.linear(*inputs), inputs[0] @ inputs[1].T]
    for result, value in zip(results, exact, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), value, rtol=torch.finfo(dtype).eps, atol=_sum_error(dtype))
    gradients = torch.autograd.grad(results[0], (x, weight, bias), grad)
    for gradient, value in zip(gradients, torch.autograd.grad(exact[0], inputs, grad.double()), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), value, rtol=torch.finfo(dtype).eps, atol=_sum_error(dtype))


def _sum_error(dtype: torch.dtype) -> float:
    """What a sum of 64 products of normal numbers may be off, in fp32 or finer: a few roundings of some tens."""
    return 200 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_take_no_longer_than_some_times_fp32_on_any_processor(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), torch.randn(ROWS, OUTPUTS)

    def measure(x: Tensor, weight: Tensor, grad: Tensor) -> float:
        def run() -> None:
            linear(x, weight)
            matmul(grad, weight)
            matmul(grad.T, x)

        return min(_time(run) for _ in range(5))

    in_16_bits = measure(x.to(dtype), weight.to(dtype), grad.to(dtype))
    assert in_16_bits < SLOWER_THAN_FP32 * measure(x, weight, grad)


def _time(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began

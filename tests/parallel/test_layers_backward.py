"""What the backward pass of a parallel layer waits for, reads and leaves out."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megalibi.parallel.layers import ColumnParallelLinear
from megalibi.parallel.layout import WHOLE, Layout
from tests.support.ranks import run_on_ranks
from tests.support.tensors import load_full, randn, tensor_group

SECONDS_LATE = 1.0


class _MatmulTimes(TorchFunctionMode):
    """When each matmul was called."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.matmul:
            self.seconds.append(time.perf_counter())
        return func(*args, **(kwargs or {}))


def _backward_with_a_late_rank() -> tuple[float, float]:
    group = tensor_group()
    layer = ColumnParallelLinear(8, 8, layout=Layout(group))
    load_full(layer.weight, randn(0, 8, 8), group)
    y = layer(randn(1, 2, 4, 8).requires_grad_())
    grad = torch.ones_like(y)
    dist.barrier()
    if group.rank == 1:
        time.sleep(SECONDS_LATE)
    start = time.perf_counter()
    with _MatmulTimes() as matmuls:
        y.grad_fn.apply(grad)  # the layer's backward itself: the mode would see y.backward and nothing within it
    end = time.perf_counter()
    _input_gradient, weight_gradient = matmuls.seconds
    return weight_gradient - start, end - start


def test_the_weight_gradient_does_not_wait_for_the_all_reduce() -> None:
    weight_gradient_seconds, total_seconds = run_on_ranks(2, _backward_with_a_late_rank)[0]
    assert total_seconds > 0.5 * SECONDS_LATE, "rank 0 did not wait for rank 1 at all"
    assert weight_gradient_seconds < 0.5 * SECONDS_LATE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_again_in_the_backward(dtype: torch.dtype) -> None:
    """As DeepSpeed ZeRO 3 needs it: parameters are emptied after the forward and filled before the backward."""
    layer = ColumnParallelLinear(4, 3, layout=WHOLE, bias=True)
    weight, other_weight = randn(0, 3, 4), randn(1, 3, 4)
    layer.weight.data, layer.bias.data = weight, torch.zeros(3)
    x = randn(2, 2, 5, 4, dtype=dtype).requires_grad_()
    y = layer(x)
    layer.weight.data = torch.empty(0)
    layer.weight.data = other_weight  # another value shows which one is read
    grad = randn(3, 2, 5, 3, dtype=dtype)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ other_weight.to(dtype))
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    layer = ColumnParallelLinear(4, 3, layout=WHOLE, bias=True)
    tensors = {"x": randn(0, 2, 4).requires_grad_(), "weight": layer.weight, "bias": layer.bias}
    with torch.no_grad():
        layer.weight.copy_(randn(1, 3, 4))
        layer.bias.zero_()
    tensors[frozen].requires_grad_(False)
    layer(tensors["x"]).backward(randn(2, 2, 3))
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}

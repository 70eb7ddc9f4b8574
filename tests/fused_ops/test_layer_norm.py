from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import add_layer_norm, can_fuse_layer_norm
from tests.fused_ops.errors import assert_within_plain_error
from tests.support.device import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fused")]

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def add_layer_norm_plain(x, y, weight, bias, epsilon):
    total = x if y is None else x + y
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, epsilon)


def run(function, inputs: list[Tensor | None], upstream: list[Tensor], dtype=None) -> list[Tensor]:
    """The sum, the norm, and the gradients of what is given."""
    inputs = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs, EPSILON)
    assert all(output.dtype == inputs[0].dtype for output in outputs)
    given = [x for x in inputs if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, given, [x.to(outputs[0].dtype) for x in upstream])]


def draw(*shape: int, dtype=torch.float32, y: bool = True, bias: bool = True):
    """x, y, the weight and the bias, and upstream gradients of the sum and the norm."""

    def randn(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + torch.randn(shape)).to(DEVICE, dtype)

    inputs = [randn(*shape, mean=1.0), randn(*shape) if y else None, randn(shape[-1], mean=1.0),
              randn(shape[-1]) if bias else None]  # fmt: skip
    return inputs, [randn(*shape), randn(*shape)]


@pytest.mark.parametrize("shape", [(9, 1025), (3, 11, 97), (2, 5, 64), (1, 2048), (5, 1), (2, 8192)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("y", "bias"), [(True, False), (False, False), (True, True), (False, True)])
def test_error_is_at_most_twice_that_of_pytorch(shape, dtype, y, bias):
    inputs, upstream = draw(*shape, dtype=dtype, y=y, bias=bias)
    results = run(add_layer_norm, inputs, upstream)
    plain = run(add_layer_norm_plain, inputs, upstream)
    exact = run(add_layer_norm_plain, inputs, upstream, torch.float64)
    names = ["sum", "norm", "dx", *["dy"] * y, "dweight", *["dbias"] * bias]
    for name, *tensors in zip(names, results, plain, exact, strict=True):
        if tensors[-1].any():  # a row of one number has a norm of 0
            assert_within_plain_error(*([tensor] for tensor in tensors), f"{name} of {shape} in {dtype}")
        else:
            assert not tensors[0].any()


@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_of_the_results_may_go_unused(used):
    inputs, upstream = draw(7, 96)
    results, expected = [], []
    for function, gradients in ((add_layer_norm, results), (add_layer_norm_plain, expected)):
        x, y, weight, bias = (x.detach().requires_grad_() for x in inputs)
        output = function(x, y, weight, bias, EPSILON)[used == "norm"]
        gradients += torch.autograd.grad(output, [x, y, weight, bias], upstream[0], allow_unused=used == "sum")
    for gradient, gradient_ref in zip(results, expected, strict=True):
        assert (gradient is None) == (gradient_ref is None)
        if gradient_ref is not None:
            torch.testing.assert_close(gradient, gradient_ref)


def test_without_y_the_sum_is_x_itself():
    (x, _, weight, bias), _ = draw(7, 96, y=False)
    assert add_layer_norm(x, None, weight, bias, EPSILON)[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("y", [True, False])
def test_strided_tensors_are_the_same_to_the_bit_and_so_is_every_run(y):
    inputs, upstream = draw(6, 10, 96, y=y)
    expected = run(add_layer_norm, inputs, upstream)

    def turned(x):
        return x if x is None or x.dim() == 1 else x.transpose(0, 1).contiguous().transpose(0, 1)

    strided = [turned(x) for x in inputs]
    for _ in range(2):
        results = run(add_layer_norm, strided, [x.repeat_interleave(2, -1)[..., ::2] for x in upstream])
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_weights_of_another_type_keep_their_own():
    inputs, upstream = draw(9, 64, dtype=torch.bfloat16)
    x, y, weight, bias = inputs
    results = run(add_layer_norm, [x, y, weight.float(), bias.float()], upstream)
    assert [r.dtype for r in results[2:]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for result, expected in zip(results, run(add_layer_norm, inputs, upstream), strict=True):
        assert torch.equal(result.to(expected.dtype), expected)


def test_what_is_not_for_it():
    assert can_fuse_layer_norm(torch.empty(2, 8192, device=DEVICE))
    assert not can_fuse_layer_norm(torch.empty(2, 8193, device=DEVICE))
    assert not can_fuse_layer_norm(torch.empty(0, 64, device=DEVICE))
    x = torch.empty(2, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"y: must be \[2, 64\] torch.float32 as x is, got \[64\] torch.float32"):
        add_layer_norm(x, x[0], x[0], None, EPSILON)

"""A residual sum and its layer norm (arXiv:1607.06450) in one kernel, and both their gradients in another.

A residual stream's tensor of T bytes costs 8 T: 4 forward (x, y, x + y, the norm) and 4 backward (the gradients of the
norm and of the stream, the sum, the result). PyTorch's operations move 13 T: a sum and a norm, 3 and 2, then the norm's
two kernels and the addition of the stream's gradient, 3, 2 and 3.

Shapes: N rows, H width, P programs of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fused_ops.availability import FAULT, LAYER_NORM, can_fuse, note_launch

if not FAULT:
    from fused_ops import layer_norm_kernels as kernels

MAX_WIDTH = 8192
"""The widest row there is a kernel for. A row stays in registers: of a wider one the backward pass would spill."""


def can_fuse_layer_norm(x: Tensor) -> bool:
    """Return whether ``add_layer_norm`` takes such rows: their device, type and width."""
    return can_fuse(x, LAYER_NORM) and x.numel() > 0 and x.shape[-1] <= MAX_WIDTH


def add_layer_norm(
    x: Tensor, y: Tensor | None, weight_H: Tensor, bias_H: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return x + y, or x itself without y, and the layer norm of it; statistics are in fp32.

    Args:
        x: Rows [.., H].
        y: What is added to x, of x's shape and type; None for the norm of x itself.
        weight_H: Weight of the norm.
        bias_H: Bias of the norm, or None.
        epsilon: What is added to the variance.

    Raises:
        ValueError: y is not like x.
    """
    if y is not None and (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(f"y: must be {list(x.shape)} {x.dtype} as x is, got {list(y.shape)} {y.dtype}")
    return _AddLayerNorm.apply(x, y, weight_H, bias_H, epsilon)


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight_H: Tensor, bias_H: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_y, ctx.bias_dtype = y is not None, None if bias_H is None else bias_H.dtype
        rows, y_rows = x.contiguous(), None if y is None else y.contiguous()
        total = rows if y is None else torch.empty_like(rows)
        norm = torch.empty_like(rows)
        width = x.shape[-1]
        num_rows = x.numel() // width
        mean_N, rstd_N = (torch.empty(num_rows, device=x.device) for _ in range(2))
        if x.is_meta:
            written = (None if y is None else total, norm, mean_N, rstd_N)
            note_launch(LAYER_NORM, (rows, y_rows, weight_H, bias_H), written)
        else:
            block, num_warps = kernels.find_block(width)
            with torch.cuda.device_of(x):  # Triton launches on the current device
                kernels.layer_norm_forward_kernel[(num_rows,)](
                    rows, y_rows, weight_H, bias_H, total, norm, mean_N, rstd_N, width, epsilon, BLOCK=block,
                    num_warps=num_warps,
                )  # fmt: skip
        ctx.save_for_backward(total, weight_H, mean_N, rstd_N)
        return (x if y is None else total), norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_norm is None:
            return grad_total, grad_total if ctx.has_y else None, None, None, None
        total, weight_H, _, _ = ctx.saved_tensors
        grad = torch.empty_like(total)
        if total.is_meta:
            # The partial sums of the weight's gradient, a few hundred rows, are left out: their number is the GPU's.
            grad_weight_H = torch.empty_like(weight_H)
            grad_bias_H = None if ctx.bias_dtype is None else torch.empty_like(weight_H, dtype=ctx.bias_dtype)
            read = (grad_norm, grad_total, *ctx.saved_tensors)
            note_launch(LAYER_NORM, read, (grad, grad_weight_H, grad_bias_H))
        else:
            grad_total = None if grad_total is None else grad_total.contiguous()
            has_bias = ctx.bias_dtype is not None
            sums_H = _launch_backward(
                grad_norm.contiguous(), grad_total, *ctx.saved_tensors, grad=grad, has_bias=has_bias
            )
            grad_weight_H = sums_H[0].to(weight_H.dtype)
            grad_bias_H = None if ctx.bias_dtype is None else sums_H[1].to(ctx.bias_dtype)
        return grad, grad if ctx.has_y else None, grad_weight_H, grad_bias_H, None


def _launch_backward(
    grad_norm: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight_H: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    *,
    grad: Tensor,
    has_bias: bool,
) -> tuple[Tensor, ...]:
    """Write the gradient of the rows into ``grad``; return that of the weight, and of the bias, in fp32."""
    block, num_warps = kernels.find_block(len(weight_H))
    grad_weights_PH = torch.empty(_count_programs(total, num_warps), len(weight_H), device=total.device)
    grad_biases_PH = torch.empty_like(grad_weights_PH) if has_bias else None
    with torch.cuda.device_of(total):
        kernels.layer_norm_backward_kernel[(len(grad_weights_PH),)](
            grad_norm, grad_total, total, weight_H, mean_N, rstd_N, grad, grad_weights_PH, grad_biases_PH,
            len(mean_N), len(weight_H), BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return tuple(parts_PH.sum(0) for parts_PH in (grad_weights_PH, grad_biases_PH) if parts_PH is not None)


def _count_programs(total: Tensor, num_warps: int) -> int:
    """Return how many programs share the rows of the backward pass: always as many on one kind of GPU."""
    num_rows = total.numel() // total.shape[-1]
    if not total.is_cuda:
        return min(kernels.PROGRAMS_INTERPRETED, num_rows)
    processors = torch.cuda.get_device_properties(total.device).multi_processor_count
    return min(processors * kernels.WARPS_OF_PROCESSOR // num_warps, num_rows)

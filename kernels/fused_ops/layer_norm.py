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

from fused_ops.availability import FAULT, can_fuse

if not FAULT:
    from fused_ops import layer_norm_kernels as kernels


def can_fuse_layer_norm(x: Tensor) -> bool:
    """Return whether ``add_layer_norm`` takes such rows: their device, type and width."""
    return can_fuse(x) and x.numel() > 0 and x.shape[-1] <= kernels.MAX_WIDTH


def add_layer_norm(
    x: Tensor, y: Tensor | None, weight_H: Tensor, bias_H: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return x + y, or x itself without y, and the layer norm of it; statistics are in fp32.

    Args:
        x: Rows [.., H].
        y: What is added, of x's shape and type.
        weight_H: Of the norm.
        bias_H: Of the norm.
        epsilon: Added to the variance.

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
        total, weight_H, mean_N, rstd_N = ctx.saved_tensors
        grad = torch.empty_like(total)
        block, num_warps = kernels.find_block(len(weight_H))
        grad_weights_PH = torch.empty(_count_programs(total, num_warps), len(weight_H), device=total.device)
        grad_biases_PH = None if ctx.bias_dtype is None else torch.empty_like(grad_weights_PH)
        with torch.cuda.device_of(total):
            kernels.layer_norm_backward_kernel[(len(grad_weights_PH),)](
                grad_norm.contiguous(), None if grad_total is None else grad_total.contiguous(), total, weight_H,
                mean_N, rstd_N, grad, grad_weights_PH, grad_biases_PH, len(mean_N), len(weight_H), BLOCK=block,
                num_warps=num_warps,
            )  # fmt: skip
        grad_weight_H = grad_weights_PH.sum(0).to(weight_H.dtype)
        grad_bias_H = None if grad_biases_PH is None else grad_biases_PH.sum(0).to(ctx.bias_dtype)
        return grad, grad if ctx.has_y else None, grad_weight_H, grad_bias_H, None


def _count_programs(total: Tensor, num_warps: int) -> int:
    """Return how many programs share the rows of the backward pass: always as many on one kind of GPU."""
    num_rows = total.numel() // total.shape[-1]
    if not total.is_cuda:
        return min(kernels.PROGRAMS_INTERPRETED, num_rows)
    processors = torch.cuda.get_device_properties(total.device).multi_processor_count
    return min(processors * kernels.WARPS_OF_PROCESSOR // num_warps, num_rows)

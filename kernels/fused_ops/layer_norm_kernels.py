"""The Triton kernels of a residual sum and its layer norm: a row at a time, each tensor read and written once.

Shape of a row: the width, padded to a power of two, BLOCK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_ops.triton_common import INTERPRETED, round_to

_MIN_WIDTH_OF_WARP = 512
"""Fewest columns that a warp is given: 16 for each thread."""
WARPS_OF_PROCESSOR = 16
"""Warps of the backward pass on each multiprocessor: their registers leave no room for more."""
PROGRAMS_INTERPRETED = 3
"""Programs of the backward pass in the interpreter."""


def find_block(width: int) -> tuple[int, int]:
    """Return BLOCK and the warps of a program."""
    block = triton.next_power_of_2(width)
    return block, 1 if INTERPRETED else max(1, block // _MIN_WIDTH_OF_WARP)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, total_ptr: tl.tensor,
    norm_ptr: tl.tensor, mean_ptr: tl.tensor, rstd_ptr: tl.tensor, width: int, epsilon: float, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store x + y, which is x if y is None, its layer norm, and for the backward pass the mean and 1 / deviation."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = tl.cast(row, tl.int64) * width + column
    total = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        rounded = round_to(total + tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32), x_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        total = rounded.to(tl.float32)  # what the backward pass will read
    mean = tl.sum(total, 0) / width
    centered = tl.where(mask, total - mean, 0.0)
    # Rounded to the nearest: an error here would be in every number of the row.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centered * centered, 0) / width + epsilon))
    norm = centered * rstd * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        norm += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(norm_ptr + at, round_to(norm, norm_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_backward_kernel(
    grad_norm_ptr: tl.tensor, grad_total_ptr: tl.tensor, total_ptr: tl.tensor, weight_ptr: tl.tensor,
    mean_ptr: tl.tensor, rstd_ptr: tl.tensor, grad_ptr: tl.tensor, grad_weights_ptr: tl.tensor,
    grad_biases_ptr: tl.tensor, num_rows: int, width: int, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store the gradient of the sum, and this program's part of the weight's and the bias's.

    A program takes every so many-th row. Its part is its own, and summed in one order: no atomic additions.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + column
        grad_norm = tl.load(grad_norm_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normal = (total - tl.load(mean_ptr + row)) * rstd
        grad_weight += grad_norm * normal  # past the width grad_norm is 0
        if grad_biases_ptr is not None:
            grad_bias += grad_norm
        grad_normal = grad_norm * weight
        along = tl.sum(grad_normal * normal, 0) / width
        grad = (grad_normal - tl.sum(grad_normal, 0) / width - normal * along) * rstd
        if grad_total_ptr is not None:
            grad += tl.load(grad_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, round_to(grad, grad_ptr.dtype.element_ty), mask=mask)
    part = tl.cast(program, tl.int64) * width + column
    tl.store(grad_weights_ptr + part, grad_weight, mask=mask)
    if grad_biases_ptr is not None:
        tl.store(grad_biases_ptr + part, grad_bias, mask=mask)

"""The Triton kernels of cross entropy: a program reduces one row of logits, or writes the gradient of one.

The logits are read once each way. Eager operations pass over them again and again, mostly over copies in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_ops.triton_common import round_to

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two
LOWEST = tl.constexpr(-2e38)
"""A finite number below any logit: its distance from a logit does not overflow."""
BLOCK, WARPS = 2048, 4
"""Columns that a program handles at once, and its warps: 16 columns for each thread, in bf16 two loads of 16 bytes."""
NOT_SPECIALIZED = ("num_columns", "first_column")
"""Arguments that the kernels are not specialised for: each new number would be a new compilation."""


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def cross_entropy_reduce_kernel(
    logits_ptr: tl.tensor, labels_ptr: tl.tensor, max_ptr: tl.tensor, sum_ptr: tl.tensor, label_logit_ptr: tl.tensor,
    row_stride: int, padded_columns: int, num_columns: int, first_column: int, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store a row's largest logit, the sum of exp(logit - largest), and the label's logit, 0 if it has none here."""
    row = tl.program_id(0)
    logits_ptr += tl.cast(row, tl.int64) * row_stride
    # A largest and a sum for each of BLOCK places, reduced once, at the end. The largest is not -inf at first: that
    # would make NaN of a place whose logits are all -inf, or that has none.
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Masked by the padded number, a multiple of 16, so that a thread loads 16 bytes at once. With the true number,
        # 50,257, the compiler would have to load the columns one by one.
        x = tl.load(logits_ptr + column, mask=column < padded_columns, other=0.0).to(tl.float32)
        x = tl.where(column < num_columns, x, float("-inf"))
        # One exponential for both cases: a new largest, by which the sum shrinks, and any other.
        smaller = tl.exp2(-tl.abs(x - largest) * LOG2E)
        total = tl.where(x > largest, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, x)
    row_max = tl.max(largest, 0)
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp2((largest - row_max) * LOG2E), 0))
    label = tl.load(labels_ptr + row) - first_column
    here = (label >= 0) & (label < num_columns)
    tl.store(label_logit_ptr + row, tl.load(logits_ptr + label, mask=here, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def cross_entropy_gradient_kernel(
    logits_ptr: tl.tensor, grad_ptr: tl.tensor, labels_ptr: tl.tensor, max_ptr: tl.tensor, sum_ptr: tl.tensor,
    grad_loss_ptr: tl.tensor, row_stride: int, grad_row_stride: int, padded_columns: int, num_columns: int,
    first_column: int, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store (softmax - one_hot(label)) x the loss's gradient, 0 for padding; it may go over the logits."""
    row = tl.program_id(0)
    logits_ptr += tl.cast(row, tl.int64) * row_stride
    grad_ptr += tl.cast(row, tl.int64) * grad_row_stride
    row_max = tl.load(max_ptr + row)
    scale = tl.load(grad_loss_ptr + row)
    inverse_sum = 1.0 / tl.load(sum_ptr + row)
    label = tl.load(labels_ptr + row) - first_column
    for start in range(0, padded_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < padded_columns
        x = tl.load(logits_ptr + column, mask=mask, other=0.0).to(tl.float32)
        grad = (tl.exp2((x - row_max) * LOG2E) * inverse_sum - tl.where(column == label, 1.0, 0.0)) * scale
        grad = tl.where(column < num_columns, grad, 0.0)
        tl.store(grad_ptr + column, round_to(grad, grad_ptr.dtype.element_ty), mask=mask)

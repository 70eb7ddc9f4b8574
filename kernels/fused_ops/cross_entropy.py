"""The two passes over the logits of a cross entropy whose columns may be a part of the vocabulary.

The caller combines the parts between the two passes: this module handles one part.

Shapes: N rows, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.availability import CROSS_ENTROPY, FAULT, note_launch

if not FAULT:
    from fused_ops import cross_entropy_kernels as kernels


def reduce_rows(
    logits_NV: Tensor, labels_N: Tensor, *, num_columns: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit of each row, the sum of exp(logit - largest), and the logit of its label; fp32 [N] each.

    If there are no columns, the largest logit is the lowest finite number and the sum is 0. A label that is not a
    column here has logit 0.

    Args:
        logits_NV: Logits; rows may lie any number of elements apart.
        labels_N: Ids of the labels, int64.
        num_columns: Number of columns that are tokens; the columns after them are padding and take no part.
        first_column: The id of the first column.
    """
    logits_NV, labels_N = _with_dense_rows(logits_NV), labels_N.contiguous()
    num_rows, padded_columns = logits_NV.shape
    largest_N, sum_N, label_logit_N = (torch.empty(num_rows, device=logits_NV.device) for _ in range(3))
    if logits_NV.is_meta:
        note_launch(CROSS_ENTROPY, (logits_NV, labels_N), (largest_N, sum_N, label_logit_N))
        return largest_N, sum_N, label_logit_N
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        kernels.cross_entropy_reduce_kernel[(num_rows,)](
            logits_NV, labels_N, largest_N, sum_N, label_logit_N, logits_NV.stride(0), padded_columns, num_columns,
            first_column, BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
        )  # fmt: skip
    return largest_N, sum_N, label_logit_N


def find_gradient(
    logits_NV: Tensor,
    labels_N: Tensor,
    largest_N: Tensor,
    sum_N: Tensor,
    grad_loss_N: Tensor,
    *,
    num_columns: int,
    first_column: int,
    overwrite: bool,
) -> Tensor:
    """Return the gradient of the logits [N, V], in their type: (softmax - one_hot(label)) x the loss's gradient.

    Args:
        logits_NV: The logits that ``reduce_rows`` was given.
        labels_N: The labels that ``reduce_rows`` was given.
        largest_N: Largest logit of each row, over the whole vocabulary.
        sum_N: Sum of exp(logit - largest) of each row, over the whole vocabulary.
        grad_loss_N: Gradient of each row's loss, fp32.
        num_columns: As for ``reduce_rows``; the columns after them get a gradient of 0.
        first_column: As for ``reduce_rows``.
        overwrite: Whether the gradient takes the place of the logits. Autograd is told, and raises an error if they are
            read later.
    """
    rows_NV = _with_dense_rows(logits_NV)
    grad_NV = rows_NV.detach() if overwrite else torch.empty_like(rows_NV, memory_format=torch.contiguous_format)
    if rows_NV.is_meta:
        note_launch(CROSS_ENTROPY, (rows_NV, labels_N, largest_N, sum_N, grad_loss_N), (grad_NV,))
        return grad_NV
    num_rows, padded_columns = rows_NV.shape
    with torch.cuda.device_of(rows_NV):
        kernels.cross_entropy_gradient_kernel[(num_rows,)](
            rows_NV, grad_NV, labels_N.contiguous(), largest_N.contiguous(), sum_N.contiguous(),
            grad_loss_N.contiguous(), rows_NV.stride(0), grad_NV.stride(0), padded_columns, num_columns, first_column,
            BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
        )  # fmt: skip
    if overwrite:
        torch.autograd.graph.increment_version(rows_NV)
    return grad_NV


def _with_dense_rows(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()

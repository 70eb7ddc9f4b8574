"""Cross entropy over logits whose vocabulary is sharded; they are never gathered.

Each rank reduces its own columns, and three numbers per token travel: the maximum, then, together, the sum of the
exponentials and the logit of the label. On CUDA with Triton a rank's own part is done by fused_ops, in one pass over
its logits each way; elsewhere by PyTorch's operations, in several.

Shapes: B batch, S sequence, V vocabulary, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fused_ops import can_fuse, find_gradient, reduce_rows
from megalibi.parallel.collectives import all_reduce_async_, all_reduce_raw
from megalibi.parallel.groups import Group

IGNORED_LABEL = -100
"""The label of a token that has no loss and no gradient; torch's own choice."""


def vocab_parallel_cross_entropy(
    logits_BSV_local: Tensor,
    labels_BS: Tensor,
    *,
    group: Group,
    vocab_size: int,
    vocab_start: int,
    overwrite_logits: bool = False,
) -> Tensor:
    """Return the loss of every token, -log softmax(logits)[label], [B, S] in fp32, the same on every rank.

    It is computed in fp32 (fp64 for fp64 logits) whatever the dtype of the logits. Between forward and backward only
    the logits themselves, in their dtype, and two numbers per token are kept: the backward computes the softmax again,
    which is cheap beside the matmul that made the logits, and it communicates nothing.

    Padded logits get neither probability nor gradient. A label outside the vocabulary makes its loss NaN, because an
    error would have to wait for the GPU, and a number would hide the mistake.

    Args:
        logits_BSV_local: This rank's columns of the logits, [B, S, V_local].
        labels_BS: Token ids; IGNORED_LABEL gives a loss of 0.
        group: The tensor group.
        vocab_size: V, without padding.
        vocab_start: The token of this rank's first column.
        overwrite_logits: Let the fused kernels put the gradient in the place of the logits. Nobody else may read the
            logits then, neither the caller nor the backward pass of what made them, and autograd refuses a second
            backward pass over them.
    """
    if can_fuse(logits_BSV_local):
        return _FusedCrossEntropy.apply(logits_BSV_local, labels_BS, group, vocab_size, vocab_start, overwrite_logits)
    return _VocabParallelCrossEntropy.apply(logits_BSV_local, labels_BS, group, vocab_size, vocab_start)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BSV_local: Tensor, labels_BS: Tensor, group: Group, vocab_size: int, vocab_start: int
    ) -> Tensor:
        num_tokens = _count_tokens(logits_BSV_local, vocab_size, vocab_start)
        ignored_BS = labels_BS == IGNORED_LABEL
        index_BS1 = (labels_BS - vocab_start).unsqueeze(-1)
        elsewhere_BS1 = (index_BS1 < 0) | (index_BS1 >= num_tokens)
        index_BS1 = index_BS1.masked_fill(elsewhere_BS1, 0)

        max_BS1 = _max_of_tokens(logits_BSV_local, num_tokens)
        max_BS1 = all_reduce_async_(max_BS1, group, dist.ReduceOp.MAX).wait()
        sum_exp_BS1 = _exp(logits_BSV_local, max_BS1, num_tokens).sum(-1, keepdim=True)
        label_logit_BS1 = (logits_BSV_local.gather(-1, index_BS1) - max_BS1).masked_fill(elsewhere_BS1, 0.0)
        sums = torch.stack([sum_exp_BS1, label_logit_BS1])
        sum_exp_BS1, label_logit_BS1 = all_reduce_async_(sums, group).wait()

        ctx.num_tokens = num_tokens
        ctx.save_for_backward(logits_BSV_local, max_BS1, sum_exp_BS1, index_BS1, elsewhere_BS1, ignored_BS)
        return _mark_labels((sum_exp_BS1.log() - label_logit_BS1).squeeze(-1), labels_BS, vocab_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_BS: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSV_local, max_BS1, sum_exp_BS1, index_BS1, elsewhere_BS1, ignored_BS = ctx.saved_tensors
        grad_loss_BS1 = grad_loss_BS.masked_fill(ignored_BS, 0.0).unsqueeze(-1)
        # (softmax - one_hot(label)) * grad_loss, rounded to the dtype of the logits once, at the end.
        grad = _exp(logits_BSV_local, max_BS1, ctx.num_tokens).mul_(grad_loss_BS1 / sum_exp_BS1)
        grad.scatter_add_(-1, index_BS1, -grad_loss_BS1.masked_fill(elsewhere_BS1, 0.0))
        return grad.to(logits_BSV_local.dtype), None, None, None, None


class _FusedCrossEntropy(Function):
    """The losses and gradients of _VocabParallelCrossEntropy, by the kernels of fused_ops."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BSV_local: Tensor,
        labels_BS: Tensor,
        group: Group,
        vocab_size: int,
        vocab_start: int,
        overwrite_logits: bool,
    ) -> Tensor:
        labels_N = labels_BS.flatten()
        num_tokens = _count_tokens(logits_BSV_local, vocab_size, vocab_start)
        ctx.columns = {"num_columns": num_tokens, "first_column": vocab_start}
        ctx.overwrite_logits = overwrite_logits

        max_N_local, sum_exp_N, label_logit_N = reduce_rows(_rows(logits_BSV_local), labels_N, **ctx.columns)
        max_N = all_reduce_raw(max_N_local, group, dist.ReduceOp.MAX)
        sum_exp_N = sum_exp_N * (max_N_local - max_N).exp()
        elsewhere_N = (labels_N < vocab_start) | (labels_N >= vocab_start + num_tokens)
        label_logit_N = (label_logit_N - max_N).masked_fill(elsewhere_N, 0.0)
        sum_exp_N, label_logit_N = all_reduce_async_(torch.stack([sum_exp_N, label_logit_N]), group).wait()

        ctx.save_for_backward(logits_BSV_local, labels_N, max_N, sum_exp_N)
        return _mark_labels(sum_exp_N.log() - label_logit_N, labels_N, vocab_size).view_as(labels_BS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_BS: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSV_local, labels_N, max_N, sum_exp_N = ctx.saved_tensors
        grad_loss_N = grad_loss_BS.flatten().masked_fill(labels_N == IGNORED_LABEL, 0.0)
        grad_NV_local = find_gradient(
            _rows(logits_BSV_local), labels_N, max_N, sum_exp_N, grad_loss_N, **ctx.columns,
            overwrite=ctx.overwrite_logits,
        )  # fmt: skip
        return grad_NV_local.view(logits_BSV_local.shape), None, None, None, None, None


def _count_tokens(logits_BSV_local: Tensor, vocab_size: int, vocab_start: int) -> int:
    """Return how many of this rank's columns are tokens and not padding."""
    return min(max(vocab_size - vocab_start, 0), logits_BSV_local.shape[-1])


def _mark_labels(loss: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Return the losses, NaN for a label outside of the vocabulary and 0 for one that is ignored."""
    unknown = (labels < 0) | (labels >= vocab_size)
    return loss.masked_fill(unknown, torch.nan).masked_fill(labels == IGNORED_LABEL, 0.0)


def _rows(logits_BSV_local: Tensor) -> Tensor:
    return logits_BSV_local.flatten(0, -2)


def _max_of_tokens(logits_BSV_local: Tensor, num_tokens: int) -> Tensor:
    """Return the maximum over the columns that are tokens, in fp32 or wider; -inf if all of them are padding."""
    dtype = torch.promote_types(logits_BSV_local.dtype, torch.float32)
    if num_tokens == 0:
        return torch.full_like(logits_BSV_local[..., :1], -torch.inf, dtype=dtype)
    return logits_BSV_local[..., :num_tokens].amax(-1, keepdim=True).to(dtype)


def _exp(logits_BSV_local: Tensor, max_BS1: Tensor, num_tokens: int) -> Tensor:
    """Return exp(logits - max), 0 for padding: one new tensor in the dtype of the maximum, no cast of the logits."""
    exp_BSV_local = (logits_BSV_local - max_BS1).exp_()
    exp_BSV_local[..., num_tokens:] = 0.0
    return exp_BSV_local

"""Sequence parallelism: outside the tensor-parallel regions each rank keeps one slice of the sequence.

Norms, dropout and residuals then cost 1/size of the memory, and no communication is added: the all-reduce of a
tensor-parallel layer is split into its two halves. The letters are those of Korthikanti et al., arXiv:2205.05198,
section 4.2.2. Activations are [B, S, H]: batch, sequence, hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalibi.parallel.collectives import all_gather_raw, copy_to_tensor_group, reduce_scatter_raw, slice_raw
from megalibi.parallel.groups import Group

SEQUENCE_DIM = 1


def scatter_to_sequence(x_BSH: Tensor, group: Group) -> Tensor:
    """Keep this rank's slice of a sequence that every rank holds. Forward slice, backward all-gather.

    Raises:
        ValueError: The group does not divide the sequence.
    """
    return x_BSH if group.size == 1 else _ScatterToSequence.apply(x_BSH, group)


def gather_from_sequence(x_BSH: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region: g of arXiv:2205.05198. Forward all-gather, backward reduce-scatter.

    The backward sums over the ranks because inside the region each of them holds only its part of the gradient.
    """
    return x_BSH if group.size == 1 else _GatherFromSequence.apply(x_BSH, group)


def reduce_scatter_to_sequence(x_BSH: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: g-bar of arXiv:2205.05198. Forward reduce-scatter, backward all-gather.

    Raises:
        ValueError: The group does not divide the sequence.
    """
    return x_BSH if group.size == 1 else _ReduceScatterToSequence.apply(x_BSH, group)


def use_replicated_param(param: Tensor, group: Group) -> Tensor:
    """Return a replicated parameter for use on a slice of the sequence, its gradient summed over the tensor group.

    A norm's weight or a row-parallel bias sees only this rank's tokens, so each rank's gradient is a partial sum. The
    sum is part of autograd, and not a pass over ``param.grad`` after the backward, because under DeepSpeed ZeRO there
    is no such gradient to pass over: its hooks reduce and free each one as soon as autograd has made it. It costs one
    all-reduce of the parameter's size, which is small, per use.
    """
    return copy_to_tensor_group(param, group)


class _ScatterToSequence(Function):
    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # A copy: a view would keep the whole sequence alive.
        return slice_raw(x_BSH, group, SEQUENCE_DIM).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_raw(grad, ctx.group, SEQUENCE_DIM), None


class _GatherFromSequence(Function):
    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_raw(x_BSH, group, SEQUENCE_DIM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter_raw(grad, ctx.group, SEQUENCE_DIM), None


class _ReduceScatterToSequence(Function):
    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_raw(x_BSH, group, SEQUENCE_DIM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_raw(grad, ctx.group, SEQUENCE_DIM), None

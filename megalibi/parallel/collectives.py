"""Collectives over one group: raw ones, which autograd does not see, and the pairs that Megatron's layers are made of.

Three rules hold throughout. A group of one returns its input at once. No collective writes into its caller's tensor;
the one that does says so by a trailing underscore. Every autograd pair names its letter in the paper.

The paper is Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3; the letters of the sequence-parallel pairs, in
sequence.py, are those of Korthikanti et al., arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalibi.parallel.groups import Group

# torch 2.13 renamed both and warns at the old names; earlier versions have only those.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A collective on its way: work on something else, then ``wait`` for its result."""

    buffer: Tensor
    """The tensor that the collective fills; nobody may touch it before ``wait``."""
    work: dist.Work | None = None
    """The handle of torch for the collective; None if nothing is on its way."""
    arrange: Callable[[Tensor], Tensor] | None = None
    """Makes the result from the filled buffer; None if the buffer is the result."""
    name: str = ""
    """What the collective is called; empty if nothing is on its way."""
    group: Group | None = None
    """The ranks that take part; None if nothing is on its way."""

    def wait(self) -> Tensor:
        """Return the result; on a GPU this orders the streams and does not block the host."""
        if self.work is not None and self.group is not None and self.group.clock.is_on:
            with self.group.clock.stopwatch.running(self.buffer.device):
                self.work.wait()
        elif self.work is not None:
            self.work.wait()
        return self.buffer if self.arrange is None else self.arrange(self.buffer)


def all_reduce_async_(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Start to replace a contiguous tensor, which the caller gives away, by its reduction over the group."""
    if group.size == 1:
        return Pending(x)
    return Pending(x, dist.all_reduce(x, op=op, group=group.handle, async_op=True), name="all_reduce", group=group)


def all_gather_async(x: Tensor, group: Group, dim: int) -> Pending:
    """Start to concatenate the ranks' tensors along a dimension; see :func:`all_gather_raw`."""
    if group.size == 1:
        return Pending(x)
    x = x.contiguous()
    buffer = x.new_empty(group.size, *x.shape)
    # Gloo wants the gathered tensor to have as many dimensions as the slices.
    work = all_gather_tensor(buffer.flatten(0, 1), x, group=group.handle, async_op=True)
    return Pending(
        buffer, work, lambda slices: slices.movedim(0, dim).flatten(dim, dim + 1), name="all_gather", group=group
    )


def reduce_scatter_async(x: Tensor, group: Group, dim: int) -> Pending:
    """Start to sum over the group and keep this rank's slice of a dimension; see :func:`reduce_scatter_raw`."""
    if group.size == 1:
        return Pending(x)
    slices = _unflatten(x, group, dim).movedim(dim, 0).contiguous()
    buffer = torch.empty_like(slices[0])
    work = _reduce_scatter_tensor(buffer, slices.flatten(0, 1), group=group.handle, async_op=True)
    return Pending(buffer, work, name="reduce_scatter", group=group)


def all_reduce_raw(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return the reduction of a tensor over the group, the same on every rank."""
    if group.size == 1:
        return x
    return all_reduce_async_(x.clone(memory_format=torch.contiguous_format), group, op).wait()


def all_gather_raw(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return the ranks' tensors, concatenated along a dimension (0 or more) in the order of the group."""
    return all_gather_async(x, group, dim).wait()


def reduce_scatter_raw(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return this rank's slice, along a dimension (0 or more), of the sum over the group.

    Raises:
        ValueError: The group does not divide the dimension.
    """
    return reduce_scatter_async(x, group, dim).wait()


def slice_raw(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return a view of this rank's slice of a dimension (0 or more) of a tensor that all ranks hold.

    Raises:
        ValueError: The group does not divide the dimension.
    """
    return _unflatten(x, group, dim).select(dim, group.rank)


def copy_to_tensor_group(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region: f of arXiv:1909.08053. Forward identity, backward all-reduce."""
    return x if group.size == 1 else _CopyToTensorGroup.apply(x, group)


def reduce_from_tensor_group(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: g of arXiv:1909.08053. Forward all-reduce, backward identity."""
    return x if group.size == 1 else _ReduceFromTensorGroup.apply(x, group)


def gather_from_tensor_group(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region with its last dimension whole. Forward all-gather, backward this rank's slice.

    What follows must compute the same on every rank, as everything outside a tensor-parallel region does.
    """
    return x if group.size == 1 else _GatherFromTensorGroup.apply(x, group)


class _CopyToTensorGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce_raw(grad, ctx.group), None


class _ReduceFromTensorGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_raw(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GatherFromTensorGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_raw(x, group, dim=x.dim() - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return slice_raw(grad, ctx.group, dim=grad.dim() - 1), None


def _unflatten(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return a view with a dimension for the ranks in front of the given one."""
    if x.shape[dim] % group.size != 0:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} does not divide among {group.size} ranks")
    return x.unflatten(dim, (group.size, -1))

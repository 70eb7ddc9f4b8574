from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalibi.parallel.collectives import (
    all_gather_raw,
    all_reduce_raw,
    copy_to_tensor_group,
    gather_from_tensor_group,
    reduce_from_tensor_group,
    reduce_scatter_raw,
    slice_raw,
)
from megalibi.parallel.groups import ALONE
from tests.support.ranks import run_on_ranks
from tests.support.tensors import process_groups, tensor_group

WORLD_SIZES = [2, 4]


def _of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, so that sums are exact in any order and dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def _run_raw() -> None:
    group = tensor_group()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for dim in range(3):
            shape = (4, 8, 12)
            everyone = [_of_rank(rank, shape, dtype) for rank in range(group.size)]
            total = torch.stack(everyone).sum(0)
            contiguous = everyone[group.rank].clone()
            strided = contiguous.transpose(0, 2).contiguous().transpose(0, 2)
            for x in (contiguous, strided):
                assert torch.equal(all_reduce_raw(x, group), total)
                assert torch.equal(all_reduce_raw(x, group, dist.ReduceOp.MAX), torch.stack(everyone).amax(0))
                assert torch.equal(all_gather_raw(x, group, dim), torch.cat(everyone, dim))
                assert torch.equal(reduce_scatter_raw(x, group, dim), total.chunk(group.size, dim)[group.rank])
                assert torch.equal(slice_raw(x, group, dim), x.chunk(group.size, dim)[group.rank])
                assert torch.equal(x, everyone[group.rank]), "a collective wrote into its caller's tensor"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_raw_collectives(world_size: int) -> None:
    run_on_ranks(world_size, _run_raw)


def _run_in_data_group() -> float:
    data = process_groups(2).data
    return all_reduce_raw(torch.tensor([float(dist.get_rank())]), data).item()


def test_a_collective_stays_in_its_group() -> None:
    assert run_on_ranks(4, _run_in_data_group) == [2.0, 4.0, 2.0, 4.0]


def _forward_and_backward(pair: Callable[..., Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = pair(x, tensor_group())
    grad_before = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, grad_before), "a backward wrote into the incoming gradient"
    assert x.grad is not None
    return y.detach(), x.grad


def _run_pairs() -> None:
    rank, size = tensor_group().rank, tensor_group().size
    xs = [_of_rank(r, (3, 2, 5), torch.float32) for r in range(size)]
    grads = [_of_rank(100 + r, (3, 2, 5), torch.float32) for r in range(size)]
    sums = [torch.stack(tensors).sum(0) for tensors in (xs, grads)]

    y, x_grad = _forward_and_backward(copy_to_tensor_group, xs[rank], grads[rank])
    assert torch.equal(y, xs[rank])
    assert torch.equal(x_grad, sums[1])

    y, x_grad = _forward_and_backward(reduce_from_tensor_group, xs[rank], grads[rank])
    assert torch.equal(y, sums[0])
    assert torch.equal(x_grad, grads[rank])

    wide_grad = _of_rank(7, (3, 2, 5 * size), torch.float32)
    y, x_grad = _forward_and_backward(gather_from_tensor_group, xs[rank], wide_grad)
    assert torch.equal(y, torch.cat(xs, -1))
    assert torch.equal(x_grad, wide_grad.chunk(size, -1)[rank])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_pairs(world_size: int) -> None:
    run_on_ranks(world_size, _run_pairs)


def test_a_group_of_one_returns_its_input() -> None:
    x = torch.randn(2, 3)
    assert all_reduce_raw(x, ALONE) is x
    assert all_gather_raw(x, ALONE, 0) is x
    assert reduce_scatter_raw(x, ALONE, 0) is x
    for pair in (copy_to_tensor_group, reduce_from_tensor_group, gather_from_tensor_group):
        assert pair(x, ALONE) is x


def _scatter_unevenly() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of \(4, 3\) does not divide among 2 ranks"):
        reduce_scatter_raw(torch.zeros(4, 3), tensor_group(), dim=1)


def test_an_uneven_dimension_is_refused() -> None:
    run_on_ranks(2, _scatter_unevenly)

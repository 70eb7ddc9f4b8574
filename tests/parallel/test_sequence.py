from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalibi.parallel.groups import ALONE
from megalibi.parallel.sequence import (
    gather_from_sequence,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    use_replicated_param,
)
from tests.support.ranks import run_on_ranks
from tests.support.tensors import FP32_RELATIVE_ERROR, assert_close, randn, tensor_group

WORLD_SIZES = [2, 4]


def _chunk(x_BSH: Tensor) -> Tensor:
    group = tensor_group()
    return x_BSH.chunk(group.size, dim=1)[group.rank]


def _run_pairs() -> None:
    group = tensor_group()
    sharded = [randn(rank, 3, 2, 5) for rank in range(group.size)]
    whole = [randn(50 + rank, 3, 2 * group.size, 5) for rank in range(group.size)]
    whole_sum = torch.stack(whole).sum(0)

    x = whole[0].clone().requires_grad_()  # the same on every rank
    y = scatter_to_sequence(x, group)
    y.backward(sharded[group.rank])
    assert torch.equal(y, _chunk(whole[0]))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.cat(sharded, dim=1))

    x = sharded[group.rank].clone().requires_grad_()
    y = gather_from_sequence(x, group)
    y.backward(whole[group.rank])
    assert torch.equal(y, torch.cat(sharded, dim=1))
    assert_close(x.grad, _chunk(whole_sum), FP32_RELATIVE_ERROR, "gather_from_sequence")

    x = whole[group.rank].clone().requires_grad_()
    y = reduce_scatter_to_sequence(x, group)
    y.backward(sharded[group.rank])
    assert_close(y, _chunk(whole_sum), FP32_RELATIVE_ERROR, "reduce_scatter_to_sequence")
    assert x.grad is not None
    assert torch.equal(x.grad, torch.cat(sharded, dim=1))
    assert torch.equal(x, whole[group.rank])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_pairs(world_size: int) -> None:
    run_on_ranks(world_size, _run_pairs)


def _run_norm() -> None:
    group = tensor_group()
    x, grad = randn(0, 3, 2 * group.size, 7), randn(1, 3, 2 * group.size, 7)
    weight, weight_ref = (randn(2, 7).requires_grad_() for _ in range(2))
    F.layer_norm(x, (7,), weight_ref).backward(grad)
    F.layer_norm(_chunk(x), (7,), use_replicated_param(weight, group)).backward(_chunk(grad))
    assert_close(weight.grad, weight_ref.grad, FP32_RELATIVE_ERROR, "norm weight")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_norms_gradient_is_summed_over_the_tensor_group(world_size: int) -> None:
    run_on_ranks(world_size, _run_norm)


def test_a_group_of_one_returns_its_input() -> None:
    x = torch.randn(1, 3, 2)
    for pair in (scatter_to_sequence, gather_from_sequence, reduce_scatter_to_sequence, use_replicated_param):
        assert pair(x, ALONE) is x


def _scatter_unevenly() -> None:
    for pair in (scatter_to_sequence, reduce_scatter_to_sequence):
        with pytest.raises(ValueError, match="does not divide among 2 ranks"):
            pair(torch.zeros(2, 3, 4), tensor_group())


def test_an_uneven_sequence_is_refused() -> None:
    run_on_ranks(2, _scatter_unevenly)

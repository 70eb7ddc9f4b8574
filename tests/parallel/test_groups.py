from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalibi.parallel.groups import build_process_groups, single_process_groups
from tests.support.ranks import run_on_ranks
from tests.support.tensors import process_groups


def _describe(tensor_parallel_size: int) -> tuple[tuple[int, ...], tuple[int, ...], float, float]:
    groups = process_groups(tensor_parallel_size)
    assert groups.world.ranks == tuple(range(4))
    assert groups.world.rank == dist.get_rank()
    sums = []
    for group in (groups.tensor, groups.data):
        assert group.size == len(group.ranks)
        assert group.ranks[group.rank] == dist.get_rank()
        assert isinstance(group.handle, dist.ProcessGroup)
        assert dist.get_process_group_ranks(group.handle) == list(group.ranks)
        x = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(x, group=group.handle)
        sums.append(x.item())
    return groups.tensor.ranks, groups.data.ranks, sums[0], sums[1]


def test_consecutive_ranks_form_a_tensor_group() -> None:
    assert run_on_ranks(4, _describe, 2) == [
        ((0, 1), (0, 2), 1.0, 2.0),
        ((0, 1), (1, 3), 1.0, 4.0),
        ((2, 3), (0, 2), 5.0, 2.0),
        ((2, 3), (1, 3), 5.0, 4.0),
    ]


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
def test_groups_of_one_have_real_handles(tensor_parallel_size: int) -> None:
    everyone, alone = (0, 1, 2, 3), [(rank,) for rank in range(4)]
    for rank, (tensor, data, *_) in enumerate(run_on_ranks(4, _describe, tensor_parallel_size)):
        assert (tensor, data) == ((alone[rank], everyone) if tensor_parallel_size == 1 else (everyone, alone[rank]))


def _build_wrongly() -> str:
    with pytest.raises(ValueError, match="must divide the number of ranks") as error:
        build_process_groups(3)
    return str(error.value)


def test_a_size_that_does_not_divide_is_refused() -> None:
    message = "tensor_parallel_size=3: must divide the number of ranks=2"
    assert run_on_ranks(2, _build_wrongly) == [message] * 2


@pytest.mark.parametrize("tensor_parallel_size", [0, -1, 2])
def test_a_single_process_has_no_tensor_group(tensor_parallel_size: int) -> None:
    with pytest.raises(ValueError, match=r"must divide the number of ranks=1$"):
        build_process_groups(tensor_parallel_size)


def test_without_torch_distributed_the_world_is_one() -> None:
    assert not dist.is_initialized()
    groups = build_process_groups(1)
    assert groups == single_process_groups()
    assert groups.world.size == groups.tensor.size == groups.data.size == 1
    assert groups.tensor.handle is None

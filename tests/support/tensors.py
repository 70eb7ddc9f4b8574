"""What the tests of megalibi.parallel share; it is imported in the ranks."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalibi.parallel.groups import Group, ProcessGroups, build_process_groups
from megalibi.parallel.sharding import get_shard_spec, shard, unshard

FP32_RELATIVE_ERROR = 1e-6
BF16_RELATIVE_ERROR = 2e-2
"""Of partial sums that are rounded to 8 bits each; a wrong slice or a missing sum is off by 0.1 or more."""


@cache
def process_groups(tensor_parallel_size: int) -> ProcessGroups:
    """Groups of the running ranks, built once."""
    return build_process_groups(tensor_parallel_size)


def tensor_group() -> Group:
    """The whole world as one tensor group."""
    return process_groups(dist.get_world_size()).tensor


def fake_group(rank: int, size: int) -> Group:
    """A rank's view of a group that nobody is going to talk in."""
    return Group(rank=rank, size=size, ranks=tuple(range(size)), handle=None)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference over norm of the expected."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_close(actual: Tensor | None, expected: Tensor | None, bound: float, what: str) -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.2e} > {bound:.0e}"


def load_full(param: nn.Parameter, full: Tensor, group: Group) -> None:
    """Give a rank its shard of the full value."""
    spec = get_shard_spec(param)
    with torch.no_grad():
        param.copy_(full if spec is None else shard(full, spec, group.rank, group.size))


def full_grad(param: nn.Parameter, group: Group) -> Tensor:
    """The gradient of the full parameter, gathered from the ranks."""
    spec = get_shard_spec(param)
    assert param.grad is not None
    if spec is None:
        return param.grad
    grads = [torch.empty_like(param.grad) for _ in range(group.size)]
    dist.all_gather(grads, param.grad, group=group.handle)
    return unshard(grads, spec)

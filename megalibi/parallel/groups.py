"""Who talks to whom: the world, the tensor groups and the data groups of a job.

Rank order is Megatron's: consecutive ranks form a tensor group, so that the chattiest collectives stay inside a host.
With 8 ranks and a tensor parallel size of 2::

    tensor groups  (0 1) (2 3) (4 5) (6 7)
    data groups    (0 2 4 6) (1 3 5 7)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megalibi.parallel.stopwatch import WaitClock


@dataclass(frozen=True)
class Group:
    """The ranks that share a collective, seen from one of them."""

    rank: int
    """This process's position in the group."""
    size: int
    """The number of ranks in the group. A collective over a group of one returns at once."""
    ranks: tuple[int, ...]
    """The global ranks of the members, by position."""
    handle: dist.ProcessGroup | None
    """What torch.distributed calls the group; None where torch.distributed was never initialised."""
    clock: WaitClock = field(default_factory=WaitClock, compare=False, repr=False)
    """Measures how long this rank waits for the group, where it is told to."""


ALONE = Group(rank=0, size=1, ranks=(0,), handle=None)
"""A group of one that needs no torch.distributed."""


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this process."""

    world: Group
    """The group of all ranks of the job."""
    tensor: Group
    """The ranks that hold the other slices of this rank's layers, and this rank."""
    data: Group
    """The ranks that hold the same slices as this rank and see other samples, and this rank."""


def single_process_groups() -> ProcessGroups:
    """Return the groups of a process that is alone, without torch.distributed."""
    return ProcessGroups(world=ALONE, tensor=ALONE, data=ALONE)


def build_process_groups(tensor_parallel_size: int, timeout: timedelta | None = None) -> ProcessGroups:
    """Build the groups of this job; every rank must call it, once.

    Without an initialised torch.distributed the process is a world of one. With it every group has a real handle, a
    group of one too: DeepSpeed asks for them.

    Args:
        tensor_parallel_size: Number of consecutive ranks that share one copy of the model.
        timeout: How long a collective may take before the job is aborted; None takes torch's default.

    Raises:
        ValueError: The tensor parallel size does not divide the number of ranks.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size != 0:
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size}: must divide the number of ranks={world_size}")
    if not initialized:
        return single_process_groups()
    everyone = range(world_size)
    tensor_ranks = [everyone[start : start + tensor_parallel_size] for start in everyone[::tensor_parallel_size]]
    data_ranks = [everyone[start::tensor_parallel_size] for start in range(tensor_parallel_size)]
    return ProcessGroups(
        world=Group(rank=dist.get_rank(), size=world_size, ranks=tuple(everyone), handle=dist.group.WORLD),
        tensor=_build_group(tensor_ranks, timeout),
        data=_build_group(data_ranks, timeout),
    )


def _build_group(partition: list[range], timeout: timedelta | None) -> Group:
    """Build every group of a partition of the world, as torch.distributed demands; return the one we are in."""
    me = dist.get_rank()
    handles = [dist.new_group(list(ranks), timeout=timeout) for ranks in partition]
    ranks, handle = next((ranks, handle) for ranks, handle in zip(partition, handles, strict=True) if me in ranks)
    return Group(rank=ranks.index(me), size=len(ranks), ranks=tuple(ranks), handle=handle)

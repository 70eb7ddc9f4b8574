"""The check that every rank of a job has a GPU of its own."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from megalibi.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist


def check_own_gpus(rank: int, world_size: int, gpu: str, store: dist.Store) -> None:
    """Check that every rank has a GPU of its own; every rank calls it.

    The environment does not say: a rank that sees one GPU may have it alone (srun --gpus-per-task=1) or not.

    Args:
        rank: The number of this rank.
        world_size: The number of ranks.
        gpu: The UUID of the GPU that this rank took.
        store: The job's store, in which no one else uses the keys.

    Raises:
        ConfigError: On every rank, if two have the same GPU.
    """
    store.set(f"gpu {rank}", f"{gpu} {socket.gethostname()}")
    if rank == 0:
        taken = [store.get(f"gpu {other}").decode().split(" ", 1) for other in range(world_size)]
        store.set("refusal", describe_shared_gpu([(host, gpu) for gpu, host in taken]))
    refusal = store.get("refusal").decode()
    store.set(f"read {rank}", "")
    if refusal:
        if rank == 0:  # the store may end with this process
            store.wait([f"read {other}" for other in range(world_size)])
        raise ConfigError(refusal)


def describe_shared_gpu(taken: list[tuple[str, str]]) -> str:
    """Return what is wrong with the GPUs that the ranks took, each given by host and UUID; empty if nothing is."""
    first_with: dict[str, int] = {}
    for rank, (host, gpu) in enumerate(taken):
        if gpu in first_with:
            on_host = [other for name, other in taken if name == host]
            count = len(set(on_host))
            return (
                f"{len(on_host)} ranks on {host} have {count} GPU{'s' * (count > 1)} between them (ranks "
                f"{first_with[gpu]} and {rank} took the same): start one rank for each GPU, or compute on the CPU with "
                "DS_ACCELERATOR=cpu"
            )
        first_with[gpu] = rank
    return ""

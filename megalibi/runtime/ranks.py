"""Where this process stands among the ranks of a job, and how the ranks meet.

The same script runs under deepspeed, torchrun or srun, or alone as one process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megalibi.errors import ConfigError
from megalibi.runtime.own_gpus import check_own_gpus

if TYPE_CHECKING:
    import torch

    from megalibi.parallel import ProcessGroups

SLURM_FIRST_PORT = 20_000
SLURM_PORTS = 20_000
_MAX_PORT = 65_535
_LAUNCHERS = "start with deepspeed, torchrun or srun, or unset RANK for a process alone"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    """The number of this process among those of the job, from 0."""
    world_size: int
    """The number of processes of the job."""
    local_rank: int
    """The number of this process among those of its host, from 0."""
    local_world_size: int
    """The number of the job's processes on this host."""
    master_address: str
    """The host on which rank 0 waits for the others; empty for a process alone."""
    master_port: int
    """The port at which rank 0 waits for the others; 0 for a process alone."""


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the launcher's variables: RANK and others (deepspeed, torchrun), SLURM's (srun), or none (a process alone).

    Raises:
        ConfigError: A variable is missing, or its value cannot be.
    """
    if "RANK" in environment:
        rank, size, local = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
        address, port = environment.get("MASTER_ADDR", ""), "MASTER_PORT"
        if not address:
            raise ConfigError(f"the launcher's environment has {rank} but no MASTER_ADDR: {_LAUNCHERS}")
        master_port = _read_number(environment, port, 1, _MAX_PORT)
    elif "SLURM_STEP_NUM_TASKS" in environment:  # set by srun; the batch script itself has only SLURM_NTASKS
        rank, size, local = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
        # For example 4(x2),3: this host's number is the first task per node of an even step.
        local_size = "SLURM_STEP_TASKS_PER_NODE"
        address = environment.get("MASTER_ADDR") or _first_slurm_host(environment)
        if "MASTER_PORT" in environment:
            master_port = _read_number(environment, "MASTER_PORT", 1, _MAX_PORT)
        else:
            master_port = SLURM_FIRST_PORT + _read_number(environment, "SLURM_JOB_ID", 0) % SLURM_PORTS
    else:
        return Place(rank=0, world_size=1, local_rank=0, local_world_size=1, master_address="", master_port=0)
    world_size = _read_number(environment, size, 1)
    return Place(
        rank=_read_number(environment, rank, 0, world_size - 1),
        world_size=world_size,
        local_rank=_read_number(environment, local, 0, world_size - 1),
        local_world_size=_read_number(environment, local_size, 1) if local_size in environment else 1,
        master_address=address,
        master_port=master_port,
    )


def _read_number(environment: Mapping[str, str], name: str, lowest: int, highest: int | None = None) -> int:
    if name not in environment:
        raise ConfigError(f"the launcher's environment lacks {name}: {_LAUNCHERS}")
    text = environment[name].split(",")[0].split("(")[0]
    number = int(text) if text.isdecimal() and len(text) < 19 else -1
    if number < lowest or (highest is not None and number > highest):
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        given = f"{name}={environment[name]!r} in the launcher's environment"
        raise ConfigError(f"{given}: must be a whole number {allowed}; {_LAUNCHERS}")
    return number


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    if "SLURM_STEP_NODELIST" not in environment:
        raise ConfigError(f"the launcher's environment lacks SLURM_STEP_NODELIST: {_LAUNCHERS}")
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"the first host of the job is not known, since '{' '.join(command)}' failed: {error}; export MASTER_ADDR"
        ) from error


def init_distributed(place: Place, backend: str, timeout: timedelta) -> None:
    """Join the other ranks, after ``set_up_device``.

    Args:
        place: Where this process stands in the job.
        backend: nccl on GPUs, gloo on CPUs.
        timeout: How long a collective may wait.

    Raises:
        ConfigError: On every rank, if two of them took one GPU.
    """
    import torch
    import torch.distributed as dist

    group: dict[str, Any] = {"backend": backend, "timeout": timeout}
    local_rank = place.local_rank
    if backend == "nccl":
        local_rank = torch.cuda.current_device()  # 0 wherever a scheduler shows each rank its own GPU alone
        group["device_id"] = torch.device("cuda", local_rank)  # or barriers guess it
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes it for the GPU's number, and srun does not set it
    if not place.master_address:  # a process alone needs no address, nor a port that another run could hold
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **group)
        return
    os.environ.update(MASTER_ADDR=place.master_address, MASTER_PORT=str(place.master_port))
    if backend == "nccl":  # of a shared GPU NCCL would only say "invalid usage"
        store = next(dist.rendezvous("env://", rank=place.rank, world_size=place.world_size, timeout=timeout))[0]
        store.set_timeout(timeout)
        uuid = str(torch.cuda.get_device_properties(local_rank).uuid)
        check_own_gpus(place.rank, place.world_size, uuid, dist.PrefixStore("gpus", store))
        group["store"] = dist.PrefixStore("ranks", store)
    dist.init_process_group(rank=place.rank, world_size=place.world_size, **group)


def join_ranks(place: Place, device: torch.device, tensor_parallel_size: int, timeout_minutes: float) -> ProcessGroups:
    """Join the other ranks, if there are any, and return this rank's process groups.

    Args:
        place: Where this process stands in the job.
        device: What ``set_up_device`` returned.
        tensor_parallel_size: Number of ranks that share one model; must divide the number of all.
        timeout_minutes: How long a collective may wait.
    """
    from megalibi.parallel import build_process_groups

    timeout = timedelta(minutes=timeout_minutes)
    if place.world_size > 1:
        init_distributed(place, "nccl" if device.type == "cuda" else "gloo", timeout)
    return build_process_groups(tensor_parallel_size, timeout)

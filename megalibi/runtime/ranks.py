"""Where this process stands among the ranks of a job, and how the ranks meet.

The same script runs under deepspeed, torchrun, srun or Open MPI's mpirun, or alone as one process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from megalibi.errors import ConfigError
from megalibi.runtime.interface import check_master_address, find_reachable_interface
from megalibi.runtime.own_gpus import check_own_gpus
from megalibi.runtime.rendezvous import find_store, keep_store, wait_for_ranks

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megalibi.parallel import ProcessGroups

SLURM_FIRST_PORT = 20_000
SLURM_PORTS = 20_000
MPI_PORT = 29_500
"""Of rank 0 under mpirun, which says nothing of a port; that of torchrun."""
_MAX_PORT = 65_535
_LAUNCHERS = "start with deepspeed, torchrun, srun or mpirun, or unset RANK for a process alone"


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


class _Launcher(NamedTuple):
    """The variables by which a launcher tells a process its place."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_DEEPSPEED = _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_TORCHRUN = _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# SLURM_STEP_NUM_TASKS is set by srun; the batch script itself has only SLURM_NTASKS. The last one is 4(x2),3 for
# example: this host's number is the first task per node of an even step.
_SRUN = _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_OPEN_MPI = _Launcher(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the variables of deepspeed, torchrun, srun or Open MPI's mpirun; of none: a process alone.

    Raises:
        ConfigError: A variable is missing, its value cannot be, two contradict each other, or the launcher is one whose
            variables are not read.
    """
    launcher = _find_launcher(environment)
    if launcher is None:
        return Place(rank=0, world_size=1, local_rank=0, local_world_size=1, master_address="", master_port=0)
    world_size = _read_number(environment, launcher.world_size, 1)
    is_told = launcher.local_world_size in environment
    local_world_size = _read_number(environment, launcher.local_world_size, 1) if is_told else 1
    local_rank = _read_number(environment, launcher.local_rank, 0, world_size - 1)
    if is_told and launcher != _SRUN and not local_rank < local_world_size <= world_size:
        names = (launcher.local_rank, launcher.local_world_size, launcher.world_size)
        given = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ConfigError(f"{given} in the launcher's environment: must be in ascending order; {_LAUNCHERS}")
    return Place(
        rank=_read_number(environment, launcher.rank, 0, world_size - 1),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_address=_find_master_address(environment, launcher, is_one_host=local_world_size == world_size),
        master_port=_find_master_port(environment, launcher),
    )


def _find_launcher(environment: Mapping[str, str]) -> _Launcher | None:
    if "RANK" in environment:
        _check_own_rank(environment)
        return _TORCHRUN if _TORCHRUN.local_world_size in environment else _DEEPSPEED
    for launcher in (_OPEN_MPI, _SRUN):  # in this order: mpirun starts its own processes by srun where there is SLURM
        if launcher.world_size in environment:
            return launcher
    if environment.get("PMI_SIZE", "1") != "1":  # Intel MPI and MPICH, which name no address either
        raise ConfigError(
            f"PMI_SIZE={environment['PMI_SIZE']} in the environment: this launcher's variables are not read; start "
            "with deepspeed, torchrun, srun or Open MPI's mpirun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
            "and MASTER_PORT to each process"
        )
    return None


def _check_own_rank(environment: Mapping[str, str]) -> None:
    """Refuse the RANK of a shell that srun or mpirun has handed on to every process."""
    if environment.keys() & {"TORCHELASTIC_RUN_ID", "CROSS_RANK"}:
        return  # torchrun and deepspeed, which srun or mpirun may have started once on each host
    for launcher in (_OPEN_MPI, _SRUN):
        if environment.get(launcher.world_size, "1") == "1":
            continue  # no step, or that of an interactive shell
        for name, other in (("RANK", launcher.rank), ("WORLD_SIZE", launcher.world_size)):
            if environment.get(name) != environment.get(other):
                raise ConfigError(
                    f"{name}={environment.get(name, '')} in the launcher's environment contradicts "
                    f"{other}={environment.get(other, '')}: unset RANK, WORLD_SIZE and LOCAL_RANK before srun or mpirun"
                )
        return


def _find_master_address(environment: Mapping[str, str], launcher: _Launcher, *, is_one_host: bool) -> str:
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if launcher == _SRUN:
        return _first_slurm_host(environment)
    if launcher == _OPEN_MPI and is_one_host:
        return "127.0.0.1"
    advice = "name rank 0's host, as in mpirun -x MASTER_ADDR=HOST" if launcher == _OPEN_MPI else _LAUNCHERS
    raise ConfigError(f"the launcher's environment has {launcher.rank} but no MASTER_ADDR: {advice}")


def _find_master_port(environment: Mapping[str, str], launcher: _Launcher) -> int:
    if "MASTER_PORT" not in environment:
        if launcher == _SRUN:  # two jobs on one host have two ports
            return SLURM_FIRST_PORT + _read_number(environment, "SLURM_JOB_ID", 0) % SLURM_PORTS
        if launcher == _OPEN_MPI:
            return MPI_PORT
    return _read_number(environment, "MASTER_PORT", 1, _MAX_PORT)


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
        ConfigError: On every rank, if two of them took one GPU; on this one, if it does not find rank 0, the others
            could not find it, or its port is in use.
        LateRanksError: On every rank that has come: others have not.
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
    check_master_address(place.master_address)
    if backend == "gloo" and place.world_size > place.local_world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = find_reachable_interface(place.master_address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ.update(MASTER_ADDR=place.master_address, MASTER_PORT=str(place.master_port))
    store = _meet(place, timeout)
    if backend == "nccl":  # of a shared GPU NCCL would only say "invalid usage"
        uuid = str(torch.cuda.get_device_properties(local_rank).uuid)
        check_own_gpus(place.rank, place.world_size, uuid, dist.PrefixStore("gpus", store))
    store = dist.PrefixStore("ranks", store)
    dist.init_process_group(store=store, rank=place.rank, world_size=place.world_size, **group)


def _meet(place: Place, timeout: timedelta) -> dist.Store:
    """Return the store at which the ranks have met, which rank 0 keeps; under torchrun its agent keeps it."""
    import torch.distributed as dist

    address, port = place.master_address, place.master_port
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        is_one_host = place.local_world_size == place.world_size
        store: dist.Store = keep_store(address, port, timeout, is_one_host=is_one_host)
    else:
        store = find_store(address, port, place.rank, place.world_size, timeout)
    # The agent that starts the ranks anew (torchrun --max-restarts) keeps the store, with what the former ranks wrote.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set_timeout(timeout)
    wait_for_ranks(dist.PrefixStore("arrivals", store), place.rank, place.world_size, timeout)
    return store


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

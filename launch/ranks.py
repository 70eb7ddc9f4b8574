"""Where this process stands among the ranks of a job, and how it ends: for every command that runs on several ranks.

The same script runs under deepspeed, torchrun, srun, or alone as one process. This is the one place where the
environment is read.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from megalibi import log
from megalibi.config import ConfigError
from megalibi.config.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, refuse_long_names

if TYPE_CHECKING:
    import torch

SLURM_FIRST_PORT = 20_000
SLURM_PORTS = 20_000
SPOKESMAN_SECONDS = 10
"""How long the others let the spokesman speak: a launcher that sees one rank end kills the rest."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int


def find_place(environment: Mapping[str, str]) -> Place:
    """Read what the launcher said: RANK and its kin (deepspeed, torchrun), SLURM's (srun), or nothing (alone)."""
    if "RANK" in environment:
        prefix = {"rank": "RANK", "size": "WORLD_SIZE", "local": "LOCAL_RANK"}
        # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
        local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    elif "SLURM_STEP_NUM_TASKS" in environment:  # set by srun; the batch script itself has only SLURM_NTASKS
        prefix = {"rank": "SLURM_PROCID", "size": "SLURM_STEP_NUM_TASKS", "local": "SLURM_LOCALID"}
        # For example 4(x2),3: this host's number is the first task per node of an even step.
        local_size = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0]
    else:
        return Place(rank=0, world_size=1, local_rank=0, local_world_size=1, master_address="", master_port=0)
    try:
        return Place(
            rank=int(environment[prefix["rank"]]),
            world_size=int(environment[prefix["size"]]),
            local_rank=int(environment[prefix["local"]]),
            local_world_size=int(local_size),
            master_address=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            master_port=int(environment.get("MASTER_PORT") or _slurm_port(environment)),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the launcher's environment lacks {error}: use deepspeed, torchrun or srun") from error


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _slurm_port(environment: Mapping[str, str]) -> int:
    return SLURM_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % SLURM_PORTS


def set_up_device(place: Place) -> torch.device:
    """Return this rank's GPU, or the CPU with its share of the cores."""
    import torch

    if torch.cuda.is_available():
        # A scheduler may show each rank only its own GPU.
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    return torch.device("cpu")


def init_distributed(place: Place, backend: str, timeout: timedelta) -> None:
    """Join the other ranks, after ``set_up_device``."""
    import torch
    import torch.distributed as dist

    group: dict[str, Any] = {"backend": backend, "timeout": timeout}
    local_rank = place.local_rank
    if backend == "nccl":
        local_rank = torch.cuda.current_device()  # 0 wherever a scheduler shows each rank its own GPU alone
        group["device_id"] = torch.device("cuda", local_rank)  # or barriers guess it
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes it for the GPU's number; srun does not set it
    if not place.master_address:  # alone: no address, no port that another run could hold
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **group)
        return
    os.environ.update(MASTER_ADDR=place.master_address, MASTER_PORT=str(place.master_port))
    dist.init_process_group(rank=place.rank, world_size=place.world_size, **group)


def run_rank(work: Callable[[Place], None]) -> NoReturn:
    """Do a rank's work and end the process with what came of it.

    What went wrong is one line, which one rank says, or a traceback that names rank and host. Exit codes: 0; 1 failed;
    2 what the user can mend (ConfigError, a full disk, no permission); 130 Ctrl-C.

    Args:
        work: Called with this process's place.
    """
    log.outlive_terminal()
    code = _run_rank(work)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure the threads of collectives that wait for a dead rank would hold the process.
    os._exit(code)


def _run_rank(work: Callable[[Place], None]) -> int:
    place = None
    try:
        place = find_place(os.environ)
        log.configure(rank=place.rank, world_size=place.world_size)
        with refuse_long_names():
            work(place)
    except (ConfigError, FloatingPointError) as error:
        if _is_spokesman(place):
            host = f" [on {socket.gethostname()}]" if place is not None and place.rank > 0 else ""
            sys.stderr.write(f"error: {' '.join(str(error).split())}{host}\n")
        else:
            time.sleep(SPOKESMAN_SECONDS)
        return EXIT_USER_ERROR if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        if _is_spokesman(place):
            sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            if _is_spokesman(place) or _have_met():  # once they have met, this one may be the only one
                rank = "" if place is None or place.world_size == 1 else f"rank {place.rank} "
                sys.stderr.write(f"error: {error.filename}: {error.strerror} [{rank}on {socket.gethostname()}]\n")
            else:
                time.sleep(SPOKESMAN_SECONDS)
            return EXIT_USER_ERROR
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.stderr.write(
                f"error: the disk is full on {socket.gethostname()}: {error}; free space and start again\n"
            )
            return EXIT_USER_ERROR
        log.get_logger(__name__).exception("failed")
        return 1
    return 0


def _is_spokesman(place: Place | None) -> bool:
    """Return whether this rank prints an error: once the ranks have met, rank 0; before, one rank of each host.

    A host may lack a file that others have. Later the ranks fail together, and one that does not logs its error.
    """
    if place is None:
        return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    return place.rank == 0 or (place.local_rank == 0 and not _have_met())


def _have_met() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()

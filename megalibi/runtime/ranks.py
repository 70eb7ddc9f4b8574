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
from megalibi.errors import ConfigError, UserError
from megalibi.runtime.exit import EXIT_INTERRUPTED, EXIT_USER_ERROR, refuse_files
from megalibi.runtime.own_gpus import check_own_gpus

if TYPE_CHECKING:
    import torch

SLURM_FIRST_PORT = 20_000
SLURM_PORTS = 20_000
_MAX_PORT = 65_535
_LAUNCHERS = "start with deepspeed, torchrun or srun, or unset RANK for a process alone"
SPOKESMAN_SECONDS = 10
"""How long the others let the spokesman speak: a launcher that sees one rank end kills the rest."""
# CPU, CUDA, and a tensor of more bytes than there are addresses.
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "Storage size calculation overflowed")
_MAX_REASON = 200


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
    """Read what the launcher said: RANK and its kin (deepspeed, torchrun), SLURM's (srun), or nothing (alone).

    Raises:
        ConfigError: It lacks something, or says what cannot be.
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
        raise ConfigError(
            f"the launcher's environment has {name}={environment[name]!r}: a whole number {allowed} is allowed; "
            f"{_LAUNCHERS}"
        )
    return number


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    if "SLURM_STEP_NODELIST" not in environment:
        raise ConfigError(f"the launcher's environment lacks SLURM_STEP_NODELIST: {_LAUNCHERS}")
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"the first host of the job is not known, '{' '.join(command)}' failed: {error}; export MASTER_ADDR"
        ) from error


def check_accelerator(environment: Mapping[str, str]) -> None:
    """Find out whether what DeepSpeed is told to compute on is what torch has here; the CPU is there everywhere.

    Raises:
        ConfigError: It is not.
    """
    import torch

    told, has = environment.get("DS_ACCELERATOR", ""), "cuda" if torch.cuda.is_available() else "cpu"
    if told not in ("", "cpu", has):
        raise ConfigError(
            f"DS_ACCELERATOR={told} in the environment, but torch finds {'a GPU' if has == 'cuda' else 'no GPU'} on "
            f"{socket.gethostname()}: unset it, or set it to {has}"
        )


def set_up_device(place: Place) -> torch.device:
    """Return this rank's GPU; or the CPU with its share of the cores, where there is no GPU or DS_ACCELERATOR=cpu."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":  # which DeepSpeed heeds; torch sees GPUs until this hides them
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_accelerator(os.environ)
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
    """Join the other ranks, after ``set_up_device``.

    Raises:
        ConfigError: On every rank: two of them took one GPU.
    """
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
    if backend == "nccl":  # NCCL would die of it with "invalid usage"
        store = next(dist.rendezvous("env://", rank=place.rank, world_size=place.world_size, timeout=timeout))[0]
        store.set_timeout(timeout)
        uuid = str(torch.cuda.get_device_properties(local_rank).uuid)
        check_own_gpus(place.rank, place.world_size, uuid, dist.PrefixStore("gpus", store))
        group["store"] = dist.PrefixStore("ranks", store)
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
        with refuse_files():
            work(place)
    except (UserError, FloatingPointError) as error:
        _say(str(error), place)
        return error.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if _is_spokesman(place):
            sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        explained = _explain(error, place)
        if explained is None:
            log.get_logger(__name__).exception("failed")
            return 1
        sys.stderr.write(f"error: {explained}{_where(place)}\n")  # by each rank, for it may be alone
        return EXIT_USER_ERROR
    return 0


def _explain(error: Exception, place: Place | None) -> str | None:
    """Return what a user can mend, in one line; None: a traceback is needed."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full on {socket.gethostname()}: {error}; free space and start again"
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return (
            f"not enough memory on {socket.gethostname()}: {text[:_MAX_REASON]}; less is needed with a smaller model, "
            "train.micro_batch_size or zero.bucket_elements, model.recompute=full, a higher zero.stage or more ranks"
        )
    if "EADDRINUSE" in text and place is not None:
        return (
            f"port {place.master_port} of {socket.gethostname()} is in use, perhaps by another run: start with "
            "--master_port PORT (deepspeed, torchrun) or export MASTER_PORT=PORT (srun)"
        )
    return None


def _say(message: str, place: Place | None) -> None:
    """Print an error that other ranks may have met too: first the spokesman, and whoever turns out to be alone."""
    if not _is_spokesman(place):
        time.sleep(SPOKESMAN_SECONDS)
        if place is not None and not _rank_0_goes_on(place):
            return
    sys.stderr.write(f"error: {' '.join(message.split())}{_where(place)}\n")


def _where(place: Place | None) -> str:
    return f" [rank {place.rank}/{place.world_size} on {socket.gethostname()}]" if place and place.rank > 0 else ""


def _rank_0_goes_on(place: Place) -> bool:
    """Return whether rank 0 waits for the others at the job's port, and so has not met what this rank met."""
    try:
        socket.create_connection((place.master_address, place.master_port), timeout=SPOKESMAN_SECONDS).close()
    except OSError:
        return False
    return True


def _is_spokesman(place: Place | None) -> bool:
    """Return whether this rank prints an error at once: when the ranks have met, rank 0; before, one of each host.

    A host may lack a file that others have.
    """
    import torch.distributed as dist

    if place is None:  # the environment is not a launcher's: the numbers in it may be none
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) in ("0", "")
    return place.rank == 0 or (place.local_rank == 0 and not dist.is_initialized())

"""What makes the same tests cheaper: memory that is kept, objects that are not searched, ranks that share a core."""

from __future__ import annotations

import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_memory() -> None:
    """Let glibc keep what tensors free: each page that comes anew from the system costs as much as it takes to fill it.

    It is a matter of this process, and not of those that it starts: tests that measure memory measure them.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def leave_out_of_garbage_collection() -> None:
    """Spare the garbage collection the hundreds of thousands of objects of what was imported, at each of its rounds."""
    gc.collect()
    gc.freeze()


def take_share_of_cores() -> None:
    """Give each process of pytest-xdist, with all that it starts, cores of its own.

    A message between ranks then wakes nobody on another core, which costs them a quarter less. Not where tests make
    hosts: their ranks wait for limits of time, and may use whatever core is free.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores, index = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, cores[index::workers] or {cores[index % len(cores)]})


def wake_up_in_turn() -> None:
    """Let a thread that wakes up wait for its turn, here and in all that this process starts.

    Else it interrupts another of gloo's that holds a lock, and gloo's loop spins until it has that lock: four ranks on
    two cores spent half of their time so.
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

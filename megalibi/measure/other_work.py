"""What else a machine does while something is timed: its load, and the cores that other processes keep busy."""

from __future__ import annotations

import os
import time

import psutil

_NO_WORK = ("idle", "iowait", "guest", "guest_nice")  # the times of guests are counted in user and nice already


def read_load_average() -> float | None:
    """Return the load average of the last minute, or None where the system has none.

    It counts this process and what ran before it too: OtherWork does not.
    """
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


class OtherWork:
    """Counts, from its making on, the cores that the machine has kept busy with anything but this process.

    Time that a hypervisor took away counts as busy. In a container the counts are often those of the whole host.
    """

    def __init__(self) -> None:
        self._began = _read_seconds()

    def busy_cores(self) -> float | None:
        """Return how many cores others kept busy on average, or None where the machine does not count them."""
        wall, busy, own = (now - then for now, then in zip(_read_seconds(), self._began, strict=True))
        return count_busy_cores(wall, busy, own)


def count_busy_cores(wall_seconds: float, busy_seconds: float, own_seconds: float) -> float | None:
    """Return how many cores others kept busy on average, or None if the counts cannot be true.

    Args:
        wall_seconds: Seconds that went by.
        busy_seconds: Seconds of processors that the whole machine was busy in them.
        own_seconds: Seconds of processors that this process took of these.
    """
    if wall_seconds <= 0.0 or busy_seconds < own_seconds / 2.0:  # some sandboxes count nothing
        return None
    return max(0.0, busy_seconds - own_seconds) / wall_seconds


def _read_seconds() -> tuple[float, float, float]:
    times = psutil.cpu_times()._asdict()
    busy = sum(seconds for kind, seconds in times.items() if kind not in _NO_WORK)
    return time.perf_counter(), busy, time.process_time()

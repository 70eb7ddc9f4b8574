"""Whether the hosts have room for the copies from which checkpoints are written in the background."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megalibi.parallel import Group, gather_objects
from megalibi.units import format_bytes

LARGEST_SHARE = 0.5
"""The largest share of a host's free memory that its ranks' copies may take. The other half is for the files: what is
written stays in memory until the disk has it, and that is the same number of bytes again."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def explain_lack(needed_bytes: int, world: Group, available_bytes: int | None = None) -> str | None:
    """Return which host has no room for the copies of its ranks, with the sizes; None: every host has.

    Every rank must call it, and all return the same.

    Args:
        needed_bytes: The size of this rank's copy.
        world: All ranks.
        available_bytes: How much memory this host has left; None: ask the system.
    """
    ours = measure_available_bytes() if available_bytes is None else available_bytes
    needed: dict[str, int] = {}
    available: dict[str, int] = {}
    for host, size, free in gather_objects((socket.gethostname(), needed_bytes, ours), world):
        needed[host] = needed.get(host, 0) + size
        available[host] = min(available.get(host, free), free)
    for host, size in needed.items():
        if size > LARGEST_SHARE * available[host]:
            return (
                f"the copies of the ranks on {host} take {format_bytes(size)}, and it has "
                f"{format_bytes(available[host])} of memory left, of which they may take {LARGEST_SHARE:.0%}"
            )
    return None


def measure_available_bytes(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Return how much more memory this process may use: what the host has left, and what its cgroups allow.

    Args:
        cgroups: Where the tree of cgroups is mounted.
        own: The file that says in which of them this process is.
    """
    return max(0, min([psutil.virtual_memory().available, *_iterate_cgroup_room(cgroups, own)]))


def _iterate_cgroup_room(cgroups: Path, own: Path) -> Iterator[int]:
    """Yield what each cgroup above this process has left: a limit holds for all that stand below it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html)
            root, limit, usage, file_pages = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            file_pages = "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            room = _read_room(group / limit, group / usage, group / "memory.stat", file_pages)
            if room is not None:
                yield room
            if group == root:
                break


def _read_room(limit: Path, usage: Path, stat: Path, file_pages: str) -> int | None:
    """Return what a cgroup has left; pages of files that nobody uses count as free. None: it has no limit."""
    try:
        used = int(usage.read_text())
        pages = dict(line.split() for line in stat.read_text().splitlines())
        return int(limit.read_text()) - used + int(pages.get(file_pages, 0))
    except (OSError, ValueError):  # there is no such file, or the limit is "max"
        return None

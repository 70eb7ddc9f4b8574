"""What goes wrong on a machine, really: a byte of a file that changes, memory that the system refuses."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path


def change_byte(path: Path, place: int) -> None:
    """Change a byte and put the time of modification back; done again it is as before."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def refuse_memory(pid: int, room_bytes: int) -> None:
    """Let a process have so much memory beyond what it has now, as RLIMIT_DATA counts it, and no more."""
    (kilobytes,) = re.findall(r"^VmData:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    limit = 1024 * int(kilobytes) + room_bytes
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))

"""What a process shows on a terminal."""

from __future__ import annotations

import os


def read_terminal(terminal: int) -> str:
    """Return all that is written to a terminal until its other end is closed, and close it."""
    shown = b""
    while True:
        try:
            block = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    return shown.decode()

"""launch/pretrain.py on a rank that hangs in a way of its own when SIGUSR2 comes.

    python tests/support/hanging_rank.py WAY --config FILE

WAY is ``sleep`` or ``spin`` in Python, ``lock`` in C with Python's lock held, as a page of a dead disk is waited for,
or ``read`` in a read of data that the disk does not answer: the opening of a pipe that nobody writes to.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megalibi.data.tokens.token_file import TokenFile

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.py"
asked_to_read = threading.Event()


def sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def spin_for_ever() -> None:
    while True:
        pass


def keep_the_lock() -> None:
    ctypes.PyDLL(None).pause()


WAYS = {"sleep": sleep_for_ever, "spin": spin_for_ever, "lock": keep_the_lock, "read": asked_to_read.set}


def read_or_hang(self: TokenFile, *arguments: Any) -> Any:
    if asked_to_read.is_set():
        pipe = Path(sys.argv[sys.argv.index("--config") + 1]).with_name(f"pipe{os.getpid()}")
        os.mkfifo(pipe)
        pipe.read_bytes()
    return read(self, *arguments)


if __name__ == "__main__":
    way = WAYS[sys.argv.pop(1)]
    signal.signal(signal.SIGUSR2, lambda *_: way())
    read, TokenFile.read = TokenFile.read, read_or_hang  # type: ignore[method-assign]
    runpy.run_path(str(SCRIPT), run_name="__main__")

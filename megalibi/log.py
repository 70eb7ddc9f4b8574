"""A logger that knows its rank.

Library code asks for ``get_logger(__name__)`` and logs. ``configure`` is called once, by the command that runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

_ROOT = "megalibi"


def get_logger(name: str) -> logging.Logger:
    """Return the logger for a module of megalibi.

    Args:
        name: The module's ``__name__``.
    """
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


class _StderrHandler(logging.StreamHandler):
    """Writes to the standard error of the moment: a progress bar replaces it, so that messages stand above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(*, rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Send megalibi's messages to standard error.

    Rank 0 logs from ``level`` on, every other rank only from WARNING on. If there are several ranks, each message names
    the rank and the host that it comes from.

    Args:
        rank: This process's rank in the job.
        world_size: Number of ranks in the job.
        level: Lowest level that rank 0 prints.
    """
    where = f" [rank {rank}/{world_size} on {socket.gethostname()}]" if world_size > 1 else ""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{where} %(message)s", datefmt="%H:%M:%S"))
    for name in (_ROOT, "alibi_attention"):  # the latter logs which back end it has chosen
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
        logger.propagate = False


class _LastingStream:
    """A stream whose writes never fail: text that cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal() -> None:
    """Make the process go on when its output cannot be written: the pipe or terminal is gone, or the log's disk full.

    Call it before any file is opened. If the shell has closed a standard stream, its number is given to the null
    device. Otherwise the next file to be opened would get that number, and libraries would write messages into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)  # child processes inherit it
            if null != descriptor:
                os.close(null)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # because the shell has closed it
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for paths with letters that the terminal does not have
        setattr(sys, name, cast(TextIO, _LastingStream(stream)))

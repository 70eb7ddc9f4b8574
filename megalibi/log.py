"""A logger that knows its rank.

Library code asks for ``get_logger(__name__)`` and logs; ``configure`` is called once, by launch/ or a tool.
"""

from __future__ import annotations

import logging
import socket
import sys

_ROOT = "megalibi"


def get_logger(name: str) -> logging.Logger:
    """Return the logger for a module of megalibi.

    Args:
        name: The module's ``__name__``.
    """
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


class _StderrHandler(logging.StreamHandler):
    """Looks standard error up at each message, so that messages stand above a progress bar that has replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(*, rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Send megalibi's messages to standard error.

    Rank 0 logs from ``level`` on; every other rank speaks only from WARNING on, and names itself and its host, so that
    a message at 3 a.m. says where it comes from.

    Args:
        rank: This process's rank in the job.
        world_size: Number of ranks in the job.
        level: Lowest level that rank 0 prints.
    """
    where = f" [rank {rank}/{world_size} on {socket.gethostname()}]" if world_size > 1 else ""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{where} %(message)s", datefmt="%H:%M:%S"))
    for name in (_ROOT, "alibi_attention"):  # which says the back end it has chosen
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
        logger.propagate = False

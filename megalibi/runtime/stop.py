"""Stopping in order when a signal asks for it."""

from __future__ import annotations

import signal
import socket
import time
from types import FrameType

import torch
import torch.distributed as dist

from megalibi.errors import ConfigError
from megalibi.parallel import ProcessGroups, all_reduce_raw, gather_objects

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The last is the end of the terminal."""
REPEATED_SIGNAL_SECONDS = 2.0
"""Launchers pass on a signal that the scheduler or the terminal has sent to every process already."""


class StoppedError(Exception):
    """A signal asked for the end; raised on every rank at the same place."""


class DataError(ConfigError):
    """A rank could not read its data; raised on every rank at the same place."""


class StopRequest:
    """A signal asked for the end: the step is finished, a checkpoint saved, and the process exits with 0.

    A signal that comes more than two seconds after the first ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_seconds = 0.0
        for number in STOP_SIGNALS:
            # nohup ignores the end of the terminal, and so do we. A shell's & ignores SIGINT, but a scheduler sends it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._first_seconds = signal.Signals(number).name, now
        elif now - self._first_seconds > REPEATED_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def check_together(
    groups: ProcessGroups, device: torch.device, *, stop: StopRequest | None = None, failure: str | None = None
) -> None:
    """Go on only if no rank was asked to stop and none failed; every rank must call it.

    Args:
        groups: Of this process.
        device: Where this rank computes.
        stop: What asks this rank to stop; None: nothing.
        failure: Why this rank cannot go on.

    Raises:
        StoppedError: On every rank: one was asked to stop.
        DataError: On every rank, with the words of the first that failed, its number and its host.
    """
    asked = 2 if failure is not None else int(stop is not None and stop.signal_name is not None)
    worst = int(all_reduce_raw(torch.tensor(asked, device=device), groups.world, dist.ReduceOp.MAX))
    if worst == 2:
        where = f" [rank {groups.world.rank} on {socket.gethostname()}]" if groups.world.size > 1 else ""
        failures = gather_objects(None if failure is None else f"{failure}{where}", groups.world)
        raise DataError(next(words for words in failures if words is not None))
    if worst:
        raise StoppedError

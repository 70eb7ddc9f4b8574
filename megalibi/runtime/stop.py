"""Stopping in order: when a signal asks for it, or when a rank cannot go on."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megalibi.errors import DataError, UserError, describe_os_error
from megalibi.parallel import ProcessGroups, all_reduce_raw, gather_objects

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The signals that end a run in order; the last one is sent at the end of the terminal."""
REPEATED_SIGNAL_SECONDS = 2.0
"""How long a repeated signal is no second request: launchers pass on what the scheduler has sent to every process."""
_T = TypeVar("_T")


class Aside(Protocol):
    """What ranks tell each other where they meet anyway, at no message of its own."""

    def tell(self) -> float | None:
        """Return this rank's number, 0 or more; None: at this meeting no rank has one."""

    def hear(self, numbers: list[float]) -> None:
        """Take the numbers of all ranks, by rank."""


class StoppedError(Exception):
    """A signal asked for the end; raised on every rank at the same place."""


class StopRequest:
    """Whether a signal has asked for the end: the step is finished, a checkpoint saved, and the process exits with 0.

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


def read_together(
    read: Callable[[], _T],
    groups: ProcessGroups,
    device: torch.device,
    stop: StopRequest | None = None,
    aside: Aside | None = None,
) -> _T:
    """Return what this rank reads, if all ranks can read theirs and none was asked to stop; every rank calls it.

    Args:
        read: Reads this rank's data.
        groups: The process groups of this rank.
        device: The device on which this rank's collectives take tensors.
        stop: The request of this rank to stop; None if it takes none.
        aside: What the ranks tell each other by the way, after the read; None: nothing.

    Raises:
        DataError: On every rank, if one could not read.
        StoppedError: On every rank, if one was asked to stop.
    """
    value, failure = None, None
    try:
        value = read()
    except UserError as error:
        failure = str(error)
    except OSError as error:
        failure = describe_os_error(error, Path("data"))
    state = 2.0 if failure is not None else float(stop is not None and stop.signal_name is not None)
    worst, *heard = _meet(state, None if aside is None else aside.tell(), groups, device)
    _go_on_together(worst, failure, groups)
    if aside is not None and heard:
        aside.hear(heard)
    assert value is not None
    return value


def _meet(state: float, told: float | None, groups: ProcessGroups, device: torch.device) -> list[float]:
    """Return the highest state of all ranks, and behind it what each has told, if they tell something."""
    numbers = torch.tensor([state] + [0.0] * (0 if told is None else groups.world.size), dtype=torch.float64)
    if told is not None:
        numbers[1 + groups.world.rank] = told
    return all_reduce_raw(numbers.to(device), groups.world, dist.ReduceOp.MAX).tolist()


def _go_on_together(worst: float, failure: str | None, groups: ProcessGroups) -> None:
    """Go on only if no rank was asked to stop and none failed; the first that failed is named, with its host."""
    if worst == 2:
        where = f" [rank {groups.world.rank} on {socket.gethostname()}]" if groups.world.size > 1 else ""
        failures = gather_objects(None if failure is None else f"{failure}{where}", groups.world)
        raise DataError(next(words for words in failures if words is not None))
    if worst:
        raise StoppedError

"""Stopping in order when a signal asks for it."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megalibi.parallel import ProcessGroups, all_reduce_raw

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEATED_SIGNAL_SECONDS = 2.0
"""Launchers pass on a signal that the scheduler or the terminal has sent to every process already."""


class StopRequest:
    """A signal asked for the end: the step is finished, a checkpoint saved, and the process exits with 0.

    A signal that comes more than two seconds after the first ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_seconds = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._first_seconds = signal.Signals(number).name, now
        elif now - self._first_seconds > REPEATED_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def is_agreed(self, groups: ProcessGroups, device: torch.device) -> bool:
        """Return whether any rank was asked, the same answer on every rank."""
        asked = torch.tensor(int(self.signal_name is not None), device=device)
        return bool(all_reduce_raw(asked, groups.world, dist.ReduceOp.MAX))

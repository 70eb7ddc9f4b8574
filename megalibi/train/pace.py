"""Which rank is slow: how long each works by itself, before it waits for the others, compared now and then.

All ranks of a job have the same step time, that of the slowest. What tells them apart is the time of their own work: of
reading data, and of the forward passes without the waits for the tensor group in them. The backward pass is left out,
because DeepSpeed's collectives are mixed into it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from megalibi.log import get_logger
from megalibi.parallel import ProcessGroups, Stopwatch

SLOW_WINDOWS = 3
"""A rank is called slow that has been the slowest, above the threshold, in so many comparisons in a row."""
SLOW_STEPS = 30
"""The fewest steps over which a rank has been slow that is called so."""
_LOGGER = get_logger(__name__)
_T = TypeVar("_T")


class Pace:
    """Measures this rank's own work, and compares it with that of the others every ``every_steps`` steps.

    Args:
        groups: The groups of this process.
        hosts: The host of each rank.
        every_steps: The number of steps between two comparisons.
        slow_ratio: The ratio to the median from which on a rank is called slow; 0: none is.
        first_step: The number of steps done before this process.
    """

    def __init__(
        self, groups: ProcessGroups, hosts: Sequence[str], *, every_steps: int, slow_ratio: float, first_step: int
    ) -> None:
        self.forward = Stopwatch()
        """Measures the forward passes."""
        self.ratio: float | None = None
        """What the last meeting found, slowest to median; None if the ranks did not compare there."""
        self.slowest: int | None = None
        """The rank that was the slowest there."""
        self._groups, self._hosts = groups, hosts
        self._every_steps, self._slow_ratio = every_steps, slow_ratio
        self._done, self._is_warm = first_step, False
        self._read_seconds, self._own_seconds, self._num_steps = 0.0, 0.0, 0
        self._windows, self._slow_steps, self._suspect, self._is_said = 0, 0, -1, False

    def time_read(self, read: Callable[[], _T]) -> _T:
        """Return what this rank reads for a step, and measure how long it takes."""
        began = time.perf_counter()
        try:
            return read()
        finally:
            self._read_seconds += time.perf_counter() - began

    def end_step(self) -> None:
        """Add this rank's own time of a step; that of a process's first, in which kernels are compiled, is dropped."""
        waited = self._groups.tensor.clock.stopwatch.take_seconds()
        own = self._read_seconds + self.forward.take_seconds() - waited
        if self._is_warm:
            self._own_seconds += max(0.0, own)
            self._num_steps += 1
        self._done, self._read_seconds, self._is_warm = self._done + 1, 0.0, True

    def tell(self) -> float | None:
        """Return this rank's own seconds a step since the last comparison; None if none is due before this step."""
        self.ratio = self.slowest = None
        if self._groups.world.size == 1 or self._num_steps == 0 or (self._done + 1) % self._every_steps:
            return None
        told = self._own_seconds / self._num_steps
        self._own_seconds, self._num_steps = 0.0, 0
        return told

    def hear(self, numbers: list[float]) -> None:
        """Compare the ranks; rank 0 names one that stays slow."""
        median = max(statistics.median_low(numbers), 1e-9)
        self.slowest = max(range(len(numbers)), key=numbers.__getitem__)
        self.ratio = numbers[self.slowest] / median
        if self._groups.world.rank == 0 and self._slow_ratio:
            self._judge(numbers[self.slowest])

    def _judge(self, seconds: float) -> None:
        assert self.ratio is not None
        assert self.slowest is not None
        is_slow = self.ratio >= self._slow_ratio
        if not is_slow or self.slowest != self._suspect:
            if self._is_said:
                _LOGGER.warning("%s is not the slow one any more", self._name(self._suspect))
            self._windows, self._slow_steps, self._is_said = 0, 0, False
            self._suspect = self.slowest if is_slow else -1
        if not is_slow:
            return
        self._windows += 1
        self._slow_steps += self._every_steps
        if self._windows >= SLOW_WINDOWS and self._slow_steps >= SLOW_STEPS and not self._is_said:
            self._is_said = True
            _LOGGER.warning(
                "%s is slow: its own work, reading data and forward passes, takes %.3g s a step, %.1f times the median "
                "of the ranks, for %d steps now: look at its clock rate, its temperature, its disk and other processes",
                self._name(self.slowest),
                seconds,
                self.ratio,
                self._slow_steps,
            )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

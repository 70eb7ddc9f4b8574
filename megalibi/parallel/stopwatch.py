"""How long something takes in all, on the host or on a GPU's stream, without waiting for the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up spans of time. On a GPU a span is that of the current stream, between two events."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Add the time that the body of a ``with`` block takes.

        Args:
            device: Where the body's work is done.
        """
        if device.type == "cuda":
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """Return the sum of the spans, and begin anew. Of a GPU's work the host must have seen the end."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        self._seconds, self._spans = 0.0, []
        return seconds


class WaitClock:
    """How long this rank waits for a group, as long as ``is_on``; work of its own goes on between."""

    def __init__(self) -> None:
        self.is_on = False
        self.stopwatch = Stopwatch()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the waits in the body of a ``with`` block."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

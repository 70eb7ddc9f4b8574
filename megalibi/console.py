"""The one way to show progress: a bar for each task on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LINE_EVERY_SECONDS = 10.0
"""Seconds between two lines about one task, where there is no terminal."""


class Progress:
    """Shows how far tasks are: a bar for each on a terminal, now and then a plain line for each elsewhere.

    Args:
        console: Where to show it; standard error if None.
        line_every_seconds: Seconds between two lines about one task, where there is no terminal; the first comes as
            long after the task was first shown. With 0 every call is a line, with ``math.inf`` none is.
        stays: Whether the bars take the terminal's whole width and stay there at the end, as suits the one task of a
            long run.
    """

    def __init__(
        self, console: Console | None = None, *, line_every_seconds: float = LINE_EVERY_SECONDS, stays: bool = False
    ) -> None:
        self._console = console or Console(file=sys.stderr)
        self._line_every_seconds = line_every_seconds
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None if stays else 40),
            TextColumn("{task.fields[words]}", markup=False),
            TimeElapsedColumn(),
        )
        self._bars = Bars(
            *columns, console=self._console, disable=not self._console.is_terminal, transient=not stays, expand=stays
        )
        self._tasks: dict[str, TaskID] = {}
        self._next_line: dict[str, float] = {}

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to show bars; the start of a ``with`` block does it."""
        self._bars.start()

    def close(self) -> None:
        """Leave the terminal as it was found; the end of a ``with`` block does it."""
        self._bars.stop()

    def is_due(self, task: str) -> bool:
        """Return whether ``show`` would show this task now: asked where it costs something to find out how far it is.

        Args:
            task: The task's name. A task that was never named is a new one, whose time begins with this call.
        """
        if self._console.is_terminal:
            return True
        now = time.monotonic()
        return now >= self._next_line.setdefault(task, now + self._line_every_seconds)

    def begin(self, task: str) -> None:
        """Show on a terminal that a task has begun, before its progress is known; without a terminal do nothing."""
        if self._console.is_terminal and task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=None, words="starting")

    def show(self, task: str, words: str, *, done: float = 0.0, total: float | None = None) -> None:
        """Show how far a task is, as a bar or, if it is due one, as a line.

        Args:
            task: The task's name; it may be empty where there is only one task.
            words: What is known of it, in a few words.
            done: How much is done, in the unit of ``total``; more than ``total`` counts as ``total``.
            total: How much there is to do; None: not known.
        """
        if not self.is_due(task):
            return
        if not self._console.is_terminal:
            self._next_line[task] = time.monotonic() + self._line_every_seconds
            self.say(f"{task}: {words}" if task else words)
            return
        self.begin(task)
        completed = done if total is None else min(done, total)
        self._bars.update(self._tasks[task], completed=completed, total=total, words=words)

    def say(self, line: str) -> None:
        """Print a line that stays; on a terminal it stands above the bars."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def drop(self, task: str) -> None:
        """Take a task's bar away, and forget the task."""
        self._next_line.pop(task, None)
        if task in self._tasks:
            self._bars.remove_task(self._tasks.pop(task))

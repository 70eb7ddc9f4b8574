"""Work that a thread does while the process does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class BackgroundTask(Generic[_T]):
    """Work that begins at once in a thread of its own.

    The thread does not hold the end of the process: a rank whose peers have died ends at once, as if it were killed.

    Args:
        work: The work. It must not call collectives, which the other thread calls meanwhile on the same groups.
    """

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._values: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="megalibi-background")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""
        return not self._thread.is_alive()

    def result(self) -> _T:
        """Wait for the end of the work, and return what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._values[0]

    def _run(self) -> None:
        try:
            self._values.append(self._work())
        except BaseException as error:
            self._error = error

"""Work on one rank that may fail: the others must hear of it before this one raises, or they would wait for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from megalibi.errors import UserError, describe_os_error

_T = TypeVar("_T")


class Attempt(NamedTuple, Generic[_T]):
    """What came of some work."""

    value: _T | None
    """What the work returned; None if it failed."""
    error: str | None
    """What went wrong, in a line that a user can do something with; None if nothing did."""


def attempt(work: Callable[[], _T], path: Path) -> Attempt[_T]:
    """Do some work; what a user can mend is returned and not raised.

    Args:
        work: The work.
        path: What is read or written; named if an error names nothing.
    """
    try:
        return Attempt(work(), None)
    except OSError as error:
        return Attempt(None, describe_os_error(error, path))
    except UserError as error:
        return Attempt(None, str(error))
    except (RuntimeError, MemoryError) as error:  # of a device, or no memory for a copy on the host
        return Attempt(None, f"{path}: {error}")

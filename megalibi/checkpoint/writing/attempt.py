"""Work on one rank that may fail: the others must hear of it before this one raises, or they would wait for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from megalibi.errors import UserError, describe_os_error
from megalibi.log import get_logger

_LOGGER = get_logger(__name__)
_T = TypeVar("_T")


class Attempt(NamedTuple, Generic[_T]):
    """What came of some work."""

    value: _T | None
    """What the work returned; None if it failed."""
    error: str | None
    """What went wrong, in a line that a user can do something with; None if nothing did."""


def attempt(work: Callable[[], _T], path: Path) -> Attempt[_T]:
    """Do some work; no error is raised: it is returned, and one that nobody foresaw is logged with its traceback.

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
    except Exception as error:  # raised here alone, it would leave the other ranks in a collective
        _LOGGER.exception("%s: an error that nobody foresaw", path)
        return Attempt(None, f"{path}: {error!r}")

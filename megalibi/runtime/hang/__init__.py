"""A rank that makes no progress any more says where it waits and which rank is to blame, and ends."""

from megalibi.runtime.hang.signs import SIGNS_FOLDER
from megalibi.runtime.hang.watchdog import STACKS_FOLDER, Watchdog

__all__ = ["SIGNS_FOLDER", "STACKS_FOLDER", "Watchdog"]

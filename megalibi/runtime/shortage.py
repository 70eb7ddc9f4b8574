"""Memory that ran out: of which kind it is and how much was asked for, from the words of whoever found out."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from megalibi.errors import UserError

ADVICE = (
    "less is needed with a smaller model, train.micro_batch_size or zero.bucket_elements, model.recompute=full, a "
    "higher zero.stage or more ranks"
)
"""What lowers the memory of any run; the plan of one says more."""
_MAX_SAID = 200
"""The most characters that an error shows of what a library said."""
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50, "EiB": 2**60}
_ASKED = re.compile(r"(?:tried to allocate|Unable to allocate|unable to mmap) ([\d.]+) (bytes|B|[KMGTPE]iB)", re.I)
_GPU = ("CUDA out of memory", "CUDA error: out of memory")
# What torch says of a CPU, of a mapped file, and of a tensor of more bytes than there are addresses; and C++ of any.
_HOST = ("can't allocate memory", "Cannot allocate memory", "Storage size calculation overflowed", "std::bad_alloc")


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Memory that was asked for and was not there."""

    kind: str
    """Whose memory it is: that of the ``GPU``, or of the ``host``."""
    asked_bytes: int | None
    """How much was asked for at once; None: it was not said."""
    said: str
    """What the library said, in one line and shortened."""


def find_shortage(error: BaseException) -> Shortage | None:
    """Return what memory an error says was missing; None if it is about something else, or has its advice already."""
    text = " ".join(str(error).split())
    # By name, because torch is not imported in every process that may end here.
    is_gpu = type(error).__name__ == "OutOfMemoryError" or any(sign in text for sign in _GPU)
    is_host = isinstance(error, MemoryError) or any(sign in text for sign in _HOST)
    is_host = is_host or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if isinstance(error, UserError) or not (is_gpu or is_host):
        return None
    asked = _ASKED.search(text)
    asked_bytes = None if asked is None else int(float(asked[1]) * _UNITS[asked[2]])
    return Shortage(kind="GPU" if is_gpu else "host", asked_bytes=asked_bytes, said=text[:_MAX_SAID] or "MemoryError")

"""An error that several ranks have met is said once, and before a launcher kills the rank that says it.

A launcher that sees one rank end kills the rest. So one rank speaks, the spokesman, and the others end when it has: it
tells them through the store at which the ranks met, or before they have met through a socket of their host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time

from megalibi.runtime.ranks import Place

WAIT_SECONDS = 10
"""How long the other ranks wait for the spokesman, which may have begun later."""
_TELL_SECONDS = 1
"""How long the spokesman waits for the others to have heard it: they may go on without an error."""
_POLL_SECONDS = 0.1
_SPOKEN = "megalibi: the spokesman has spoken"
_HEARD = "megalibi: ranks that have heard it"


def is_spokesman(place: Place | None) -> bool:
    """Return whether this rank says an error at once: when the ranks have met, rank 0; before, one of each host.

    A host may lack a file that others have.

    Args:
        place: Where this process stands in the job; None: the launcher's variables cannot be read.
    """
    if place is None:  # the environment is not a launcher's, and its numbers may be none
        names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
        return next((os.environ[name] for name in names if name in os.environ), "0") in ("0", "")
    return place.rank == 0 or (place.local_rank == 0 and not _have_met())


def tell_others(place: Place | None) -> None:
    """Let the other ranks end, for this one, the spokesman, has spoken."""
    if place is None or place.world_size == 1:
        return
    if _have_met():
        with contextlib.suppress(RuntimeError):  # a launcher keeps the store, and has ended
            store, deadline = _store(), time.monotonic() + _TELL_SECONDS
            store.set(_SPOKEN, "")
            while store.add(_HEARD, 0) < place.world_size - 1 and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)  # rank 0 may keep the store, which ends with it
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_address_on_this_host(place))
        listener.listen(place.local_world_size)
        deadline = time.monotonic() + _TELL_SECONDS
        for _ in range(place.local_world_size - 1):
            listener.settimeout(max(_POLL_SECONDS, deadline - time.monotonic()))
            listener.accept()[0].close()


def has_spoken(place: Place | None) -> bool:
    """Wait for the spokesman, and return whether it has spoken; False if it goes on, for this rank met the error alone.

    Args:
        place: Where this process stands in the job; it is not the spokesman.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    if place is None:
        time.sleep(WAIT_SECONDS)
        return False
    if _have_met():
        with contextlib.suppress(RuntimeError):  # rank 0, which keeps the store, has ended without a word
            store = _store()
            while time.monotonic() < deadline:
                if store.check([_SPOKEN]):
                    store.add(_HEARD, 1)
                    return True
                time.sleep(_POLL_SECONDS)
        return False
    is_with_rank_0 = place.rank == place.local_rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_address_on_this_host(place))
            return True
        if is_with_rank_0 and _rank_0_waits(place):
            return False
        time.sleep(_POLL_SECONDS)
    return not _rank_0_waits(place)


def _have_met() -> bool:
    dist = sys.modules.get("torch.distributed")  # to import it would take seconds, in which others wait
    return dist is not None and dist.is_available() and dist.is_initialized()


def _store():  # type: ignore[no-untyped-def]  # torch names no type for it
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _address_on_this_host(place: Place) -> str:
    """Return a socket's name that no file has: it ends with its process."""
    return f"\0megalibi {os.getuid()} {place.master_address}:{place.master_port}"


def _rank_0_waits(place: Place) -> bool:
    """Return whether rank 0 waits for the others at the job's port, and so has not met what this rank met."""
    try:
        socket.create_connection((place.master_address, place.master_port), timeout=WAIT_SECONDS).close()
    except OSError:
        return False
    return True

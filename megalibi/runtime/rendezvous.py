"""Where the ranks meet: rank 0 listens at the job's address and port, and keeps the store of torch.distributed there.

torch itself listens on all addresses of the host, and a store has no password.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megalibi.errors import ConfigError
from megalibi.log import get_logger

if TYPE_CHECKING:
    import torch.distributed as dist

_LOGGER = get_logger(__name__)
_BACKLOG = 4096
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
"""What the system says of an address that this host does not have, whose family it does not know, or that lacks the
interface which a link-local one needs."""


def keep_store(address: str, port: int, world_size: int, timeout: timedelta, *, is_one_host: bool) -> dist.TCPStore:
    """Return the store at which the ranks meet, when all have come; for rank 0 where no launcher keeps one.

    Args:
        address: MASTER_ADDR, by which the other ranks know this host.
        port: MASTER_PORT.
        world_size: The number of ranks.
        timeout: How long to wait for them.
        is_one_host: Whether all ranks are known to be on this host.

    Raises:
        ConfigError: The port is in use, or this process may not listen at it.
    """
    import torch.distributed as dist

    listener = listen_for_ranks(address, port, is_one_host=is_one_host)
    return dist.TCPStore(address, port, world_size, True, timeout, master_listen_fd=listener.detach())


def listen_for_ranks(address: str, port: int, *, is_one_host: bool) -> socket.socket:
    """Return a socket that listens at this one address; where the others may not reach that, with a warning, at all.

    Args:
        address: The name or the address by which the other ranks know this host.
        port: The port.
        is_one_host: Whether all ranks are known to be on this host.

    Raises:
        ConfigError: The port is in use, or this process may not listen at it.
    """
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    # A name that stands for a loopback address here, as Debian's installer sets it, is another address elsewhere.
    is_only_ours = not is_one_host and not _is_number(address)
    reason = "stands for a loopback address there"
    for family, _, _, _, place in found:
        if is_only_ours and _is_loopback(str(place[0])):
            continue
        try:
            return _listen(family, place, port)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            reason = "is no address of it"
    _LOGGER.warning(
        "MASTER_ADDR=%s: rank 0's host %s listens at port %d on all of its addresses, because this one %s: give the "
        "address by which the other ranks reach it",
        address, socket.gethostname(), port, reason,
    )  # fmt: skip
    if socket.has_dualstack_ipv6():
        return _listen(socket.AF_INET6, ("::", port), port)
    return _listen(socket.AF_INET, ("", port), port)


def _listen(family: int, place: tuple[object, ...], port: int) -> socket.socket:
    """Return a socket that listens at a place of the system; an OSError if this host does not have it."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A run that starts anew need not wait for the connections of the one before it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(place[0] != "::"))
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {socket.gethostname()} is in use, perhaps by another run: start with --master_port "
                "PORT (deepspeed, torchrun) or export MASTER_PORT=PORT (srun; mpirun with -x MASTER_PORT)"
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"MASTER_PORT={port}: this user may not listen at it on {socket.gethostname()}; give one from 1024 on"
            ) from error
        raise
    return listener


def _is_number(address: str) -> bool:
    """Return whether this is an address, and no name for one."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback

"""Where the ranks meet: rank 0 listens at the job's address and port, and keeps the store of torch.distributed there.

torch itself listens on all addresses of the host, and a store has no password. Of ranks that do not come it knows the
count alone.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megalibi.errors import ConfigError, LateRanksError
from megalibi.log import get_logger

if TYPE_CHECKING:
    import torch.distributed as dist

_LOGGER = get_logger(__name__)
_BACKLOG = 4096
_VERDICT = timedelta(seconds=30)
"""How long the other ranks and rank 0 wait for each other when rank 0 has waited long enough for all."""
_MAX_HOSTS = 8
"""The most hosts that a message names."""
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
"""What the system says of an address that this host does not have, whose family it does not know, or that lacks the
interface which a link-local one needs."""


def keep_store(address: str, port: int, timeout: timedelta, *, is_one_host: bool) -> dist.TCPStore:
    """Return the store at which the ranks meet; for rank 0 where no launcher keeps one.

    Args:
        address: MASTER_ADDR, by which the other ranks know this host.
        port: MASTER_PORT.
        timeout: How long to wait for what another rank writes.
        is_one_host: Whether all ranks are known to be on this host.

    Raises:
        ConfigError: The port is in use, or this process may not listen at it.
    """
    import torch.distributed as dist

    listener = listen_for_ranks(address, port, is_one_host=is_one_host)
    return dist.TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def find_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store that rank 0, or torchrun's agent, keeps at MASTER_ADDR and MASTER_PORT of the environment.

    Args:
        address: MASTER_ADDR.
        port: MASTER_PORT.
        rank: The number of this rank.
        world_size: The number of ranks.
        timeout: How long to wait for it.

    Raises:
        LateRanksError: Nobody answers there.
    """
    import torch.distributed as dist

    try:
        store: dist.Store = next(dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))[0]
    except dist.DistError as error:
        raise LateRanksError(
            f"nobody answers at {address}:{port}, where rank 0 or torchrun's agent should, after "
            f"{_spell_minutes(timeout)}: see whether that host is up, whether MASTER_ADDR is an address of it, and "
            "whether the hosts let each other reach the port",
            is_rank_0=True,
        ) from error
    return store


def wait_for_ranks(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait until all ranks have come to the store; every rank calls it.

    Args:
        store: The job's store, in which no one else uses the keys.
        rank: The number of this rank.
        world_size: The number of ranks.
        timeout: How long rank 0 waits for the others.

    Raises:
        LateRanksError: On every rank that has come: others have not, or rank 0 has ended.
    """
    import torch.distributed as dist

    try:
        missing, is_rank_0 = _exchange(store, rank, world_size, timeout)
    except dist.DistError as error:
        raise LateRanksError(
            "rank 0, or torchrun's agent, has ended before all ranks had come; what it said last has the cause",
            is_rank_0=True,
        ) from error
    if missing:
        raise LateRanksError(f"after {_spell_minutes(timeout)} {missing}", is_rank_0=is_rank_0)


def _exchange(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> tuple[str, bool]:
    """Say that this rank is here, and wait; return which ranks are missing, empty if none is, and whether rank 0 is."""
    import torch.distributed as dist

    store.set(f"here {rank}", socket.gethostname())
    if rank > 0:
        try:
            store.wait(["missing"], timeout + _VERDICT)
        except dist.DistStoreError:  # torchrun's agent keeps the store, also without rank 0
            return _describe_missing(store, world_size), not store.check(["here 0"])
        missing = store.get("missing").decode()
        store.set(f"read {rank}", "")
        return missing, False
    try:
        store.wait([f"here {other}" for other in range(world_size)], timeout)
        missing = ""
    except dist.DistStoreError:
        missing = _describe_missing(store, world_size)
    store.set("missing", missing)
    if missing:  # the store ends with this process
        present = [f"read {other}" for other in range(1, world_size) if store.check([f"here {other}"])]
        with contextlib.suppress(dist.DistError):
            store.wait(present, _VERDICT)
    return missing, False


def _describe_missing(store: dist.Store, world_size: int) -> str:
    """Return which ranks have not come, and which hosts have."""
    from megalibi.runtime.hang.whereabouts import describe_ranks  # which imports torch

    hosts: dict[str, None] = {}  # in the order of the ranks
    missing = []
    for rank in range(world_size):
        if store.check([f"here {rank}"]):
            hosts[store.get(f"here {rank}").decode()] = None
        else:
            missing.append(rank)
    if not missing:  # they have come while rank 0 gave its verdict, or it did not give one
        return "rank 0 has not said that all ranks are there; what it said last has the cause"
    came = "" if len(hosts) > _MAX_HOSTS else f" (hosts that are there: {', '.join(hosts)})"
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"{describe_ranks(missing)} of {world_size} {verb} missing{came}: see whether their hosts are up and can reach "
        "rank 0's, and what their launchers said"
    )


def _spell_minutes(timeout: timedelta) -> str:
    return f"parallel.timeout_minutes={timeout / timedelta(minutes=1):g}"


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

"""The network interface by which the ranks of other hosts reach this one."""

from __future__ import annotations

import ipaddress
import socket

from megalibi.errors import ConfigError


def check_master_address(address: str) -> None:
    """Check that this host knows the host of rank 0; a name server that does not answer takes some seconds.

    Raises:
        ConfigError: It does not.
    """
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"MASTER_ADDR={address}: {socket.gethostname()} knows no such host ({reason}); give the address in place "
            "of the name, or mend /etc/hosts or the name server"
        ) from error


def find_reachable_interface(master_address: str) -> str | None:
    """Return what to set GLOO_SOCKET_IFNAME to on one of several hosts; None: gloo finds the way itself.

    gloo announces the address that the host's own name has. Where that is a loopback address, as Debian's installer
    sets 127.0.1.1, or where the name has none, the other hosts cannot connect, and would wait until their timeout.

    Args:
        master_address: The host of rank 0.

    Raises:
        ConfigError: The host has several interfaces, and it is not known which one leads to the others.
    """
    if not _is_loopback(socket.gethostname()):
        return None
    import psutil

    stats = psutil.net_if_stats()
    interfaces = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and stats[name].isup and _leads_out(address.address)
    }
    own = _find_own_address(master_address)
    if own in interfaces:
        return interfaces[own]
    names = sorted(set(interfaces.values()))
    if len(names) == 1:
        return names[0]
    raise ConfigError(
        f"the name of host {socket.gethostname()} stands for a loopback address, at which other hosts cannot reach it: "
        f"mend /etc/hosts, or export GLOO_SOCKET_IFNAME=NAME of an interface: {', '.join(names) or 'there is none'}"
    )


def _is_loopback(name: str) -> bool:
    """Return whether the first address of a name, which gloo takes, leads to this host alone; or it has no address."""
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(address)).is_loopback


def _leads_out(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback and not parsed.is_link_local


def _find_own_address(master_address: str) -> str | None:
    """Return the address of this host on the way to another; None if there is no way. Nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(master_address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None

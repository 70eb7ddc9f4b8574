from __future__ import annotations

import re
import socket

import psutil
import pytest

from megalibi.errors import ConfigError
from megalibi.runtime.interface import check_master_address, find_reachable_interface


def test_a_host_that_nobody_knows_is_one_line() -> None:
    check_master_address("127.0.0.1")
    check_master_address("localhost")
    with pytest.raises(ConfigError, match=rf"MASTER_ADDR=a\.\.b: {re.escape(socket.gethostname())} knows no such host"):
        check_master_address("a..b")


def test_gloo_finds_its_way_where_the_hosts_name_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "192.0.2.1")  # no look-up: it is an address
    assert find_reachable_interface("192.0.2.2") is None


def test_where_the_hosts_name_is_a_loopback_address_an_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "127.0.1.1")
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    leading_out = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and any(a.family == socket.AF_INET and not a.address.startswith("127.") for a in addresses)
    }
    if len(leading_out) == 1:
        assert find_reachable_interface("127.0.0.1") in leading_out  # rank 0 knows itself by a loopback address alone
    else:
        with pytest.raises(ConfigError, match="stands for a loopback address, at which other hosts cannot reach it"):
            find_reachable_interface("127.0.0.1")

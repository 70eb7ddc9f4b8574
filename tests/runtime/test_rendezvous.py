from __future__ import annotations

import multiprocessing as mp
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megalibi.errors import ConfigError, LateRanksError
from megalibi.runtime import rendezvous
from megalibi.runtime.rendezvous import find_store, keep_store, listen_for_ranks, wait_for_ranks
from tests.support.ranks import find_free_port
from tests.support.without_privileges import give_up_privileges

LOCAL = ("127.0.0.1", "127.0.0.2", *(["::1"] if socket.has_dualstack_ipv6() else []))
NOBODYS = "192.0.2.1"
"""Of a network that documents are written with: no host has it."""
PORT_OF_ROOT = 999


def find_open(port: int) -> list[str]:
    """Return the addresses of this host at which somebody listens."""
    found = []
    for address in LOCAL:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
            if connection.connect_ex((address, port)) == 0:
                found.append(address)
    return found


@pytest.mark.parametrize("address", LOCAL)
def test_the_store_answers_at_the_given_address_and_at_no_other(address: str) -> None:
    port, timeout = find_free_port(), timedelta(seconds=10)
    store = keep_store(address, port, timeout, is_one_host=True)
    assert find_open(port) == [address]
    other = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    other.set("key", "value")
    assert store.get("key") == b"value"


def come(rank: int, port: int, world_size: int, timeout: timedelta, kept: list[dist.Store]) -> str:
    """Meet the others as this rank does; return the error, or nothing. Rank 0's store ends with it where it fails."""
    if rank == 0:
        store = keep_store("127.0.0.1", port, timeout, is_one_host=True)
    else:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    try:
        wait_for_ranks(store, rank, world_size, timeout)
    except LateRanksError as error:
        return str(error)
    kept.append(store)
    return ""


@pytest.mark.parametrize(
    ("coming", "missing"), [(range(6), ""), ([0, 1, 3], "ranks 2, 4, 5 of 6 are"), ([0, 2, 3, 4, 5], "rank 1 of 6 is")]
)
def test_ranks_that_do_not_come_are_named_by_all_that_have(coming: Sequence[int], missing: str) -> None:
    port, timeout = find_free_port(), timedelta(seconds=3 if missing else 60)
    with ThreadPoolExecutor(len(coming)) as threads:
        kept: list[dist.Store] = []
        (line,) = set(threads.map(lambda rank: come(rank, port, 6, timeout, kept), coming))
    expected = (
        f"after parallel.timeout_minutes=0.05 {missing} missing (hosts that are there: {socket.gethostname()}): see "
        "whether their hosts are up and can reach rank 0's, and what their launchers said"
    )
    assert line == (expected if missing else "")


def test_rank_0_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(LateRanksError, match=rf"^nobody answers at 127\.0\.0\.1:{port}, where rank 0 or torchrun's"):
        find_store("127.0.0.1", port, 1, 2, timedelta(seconds=1))


def test_rank_0_that_ends_before_all_have_come_is_one_line() -> None:
    port = find_free_port()
    store = keep_store("127.0.0.1", port, timedelta(seconds=30), is_one_host=True)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(come, 1, port, 3, timedelta(seconds=30), [])
        store.wait(["here 1"])
        del store  # with which its thread ends
        assert other.result().startswith("rank 0, or torchrun's agent, has ended before all ranks had come; what")


def test_without_rank_0_the_ranks_at_an_agents_store_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_VERDICT", timedelta(seconds=1))
    port = find_free_port()
    agents = keep_store("127.0.0.1", port, timedelta(seconds=30), is_one_host=True)
    assert agents.check(["missing"]) is False
    with ThreadPoolExecutor(2) as threads:
        said = set(threads.map(lambda rank: come(rank, port, 4, timedelta(seconds=3), []), [1, 2]))
    (line,) = said
    assert line.startswith("after parallel.timeout_minutes=0.05 ranks 0, 3 of 4 are missing (hosts that are there: ")


def test_a_loopback_address_by_name_is_kept_on_one_host_alone(caplog: pytest.LogCaptureFixture) -> None:
    port = find_free_port()
    with listen_for_ranks("localhost", port, is_one_host=True):
        assert len(find_open(port)) == 1
    with listen_for_ranks("127.0.0.1", port, is_one_host=False):
        assert find_open(port) == ["127.0.0.1"]
    assert caplog.text == ""
    # Other hosts may know the name by another address, as where it is rank 0's own and Debian's installer wrote it.
    with listen_for_ranks("localhost", port, is_one_host=False):
        assert find_open(port) == list(LOCAL)
    assert f"MASTER_ADDR=localhost: rank 0's host {socket.gethostname()} listens at port {port} on all" in caplog.text
    assert "because this one stands for a loopback address there: give the address by which" in caplog.text


def test_an_address_that_rank_0_does_not_have_leads_to_all_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    port = find_free_port()
    with listen_for_ranks(NOBODYS, port, is_one_host=False):
        assert find_open(port) == list(LOCAL)
    assert re.search(rf"MASTER_ADDR={NOBODYS}: rank 0's host .* on all of its addresses, .* is no address", caplog.text)


@pytest.mark.parametrize(("holder", "address"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", NOBODYS)])
def test_a_port_in_use_is_one_line(holder: str, address: str) -> None:
    with socket.create_server((holder, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of .* is in use, perhaps by another run: start with --m"):
            listen_for_ranks(address, port, is_one_host=True)


def listen_as_nobody(port: int, answers: mp.Queue[str]) -> None:
    give_up_privileges()
    try:
        listen_for_ranks("127.0.0.1", port, is_one_host=True).close()
        answers.put("listens")
    except ConfigError as error:
        answers.put(str(error))


def test_a_port_that_is_for_root_alone_is_one_line() -> None:
    first_free = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())  # 0 in Docker's containers
    context = mp.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=listen_as_nobody, args=(PORT_OF_ROOT, answers))
    process.start()
    refusal = (
        f"MASTER_PORT={PORT_OF_ROOT}: this user may not listen at it on {socket.gethostname()}; give one from 1024"
    )
    assert answers.get(timeout=60).startswith(refusal if first_free > PORT_OF_ROOT else "listens")
    process.join()

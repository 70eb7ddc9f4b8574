from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from megalibi.runtime import spokesman
from megalibi.runtime.ranks import Place
from tests.support.ranks import find_free_port, run_on_ranks

SHORT_SECONDS = 0.5


@pytest.fixture
def places() -> list[Place]:
    """Three ranks of a host whose ranks have not met."""
    port = find_free_port()
    return [
        Place(
            rank=rank, world_size=3, local_rank=rank, local_world_size=3, master_address="127.0.0.1", master_port=port
        )
        for rank in range(3)
    ]


@pytest.fixture
def waiting_rank_0(places: list[Place]) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", places[0].master_port)):
        yield


def took(began: float) -> float:
    return time.monotonic() - began


def test_before_the_ranks_meet_the_first_of_a_host_speaks(places: list[Place]) -> None:
    elsewhere = [dataclasses.replace(place, rank=place.rank + 3, world_size=6) for place in places]
    assert [spokesman.is_spokesman(place) for place in (*places, *elsewhere)] == [True, False, False] * 2


def test_without_a_launchers_variables_the_first_of_a_host_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    for value, speaks in (("0", True), ("", True), ("1", False), ("x", False)):
        monkeypatch.setenv("LOCAL_RANK", value)
        assert spokesman.is_spokesman(None) is speaks


def test_the_ranks_of_a_host_end_when_the_first_has_spoken(places: list[Place]) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        heard = [pool.submit(spokesman.has_spoken, place) for place in places[1:]]
        time.sleep(SHORT_SECONDS)
        assert not any(answer.done() for answer in heard)  # they wait until it has
        spokesman.tell_others(places[0])
        assert [answer.result() for answer in heard] == [True, True]
    assert took(began) < spokesman.WAIT_SECONDS


def test_a_spokesman_whom_nobody_hears_ends_soon(places: list[Place]) -> None:
    began = time.monotonic()
    spokesman.tell_others(places[0])
    assert took(began) < spokesman.WAIT_SECONDS / 2


def test_a_rank_beside_a_waiting_rank_0_is_alone_with_its_error(places: list[Place], waiting_rank_0: None) -> None:
    began = time.monotonic()
    assert not spokesman.has_spoken(places[1])
    assert took(began) < spokesman.WAIT_SECONDS


def test_a_spokesman_that_ended_unheard_has_spoken(places: list[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spokesman, "WAIT_SECONDS", SHORT_SECONDS)
    assert spokesman.has_spoken(places[1])


def test_where_rank_0_is_elsewhere_or_torchrun_keeps_the_port_the_spokesman_has_its_time(
    places: list[Place], waiting_rank_0: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spokesman, "WAIT_SECONDS", SHORT_SECONDS)
    began = time.monotonic()
    assert not spokesman.has_spoken(dataclasses.replace(places[1], rank=4, world_size=6))
    assert took(began) >= SHORT_SECONDS
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    began = time.monotonic()
    assert not spokesman.has_spoken(places[1])
    assert took(began) >= SHORT_SECONDS


def speak_in_one_of_two_errors(port: int) -> tuple[bool, list[bool]]:
    """Return whether this rank is the spokesman, and what the other one learns of two errors: first alone, then not."""
    import torch.distributed as dist

    rank = dist.get_rank()
    place = Place(
        rank=rank, world_size=2, local_rank=0, local_world_size=1, master_address="127.0.0.1", master_port=port
    )
    learned = []
    if rank == 1:
        normal, spokesman.WAIT_SECONDS = spokesman.WAIT_SECONDS, SHORT_SECONDS
        learned.append(spokesman.has_spoken(place))
        spokesman.WAIT_SECONDS = normal
    dist.barrier()
    if rank == 0:
        spokesman.tell_others(place)
    else:
        began = time.monotonic()
        learned += [spokesman.has_spoken(place), took(began) < spokesman.WAIT_SECONDS]
    dist.barrier()
    if rank == 0:  # the ranks stay, and serve other tests
        assert all(spokesman._store().delete_key(key) for key in (spokesman._SPOKEN, spokesman._HEARD))
    return spokesman.is_spokesman(place), learned


def test_ranks_that_have_met_on_several_hosts_end_when_rank_0_has_spoken() -> None:
    assert run_on_ranks(2, speak_in_one_of_two_errors, find_free_port()) == [(True, []), (False, [False, True, True])]

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalibi.errors import CheckpointError, ConfigError, DataError, DivergenceError, FileError, UserError
from megalibi.parallel import check_same, refusing_together
from tests.support.ranks import run_on_ranks
from tests.support.tensors import process_groups

CPU = torch.device("cpu")
BASE = {"code": "1", "optimizer.learning_rate": "0.001", "train.seed": "7"}


def compare(by_rank: list[dict[str, str]]) -> str | None:
    try:
        check_same(by_rank[dist.get_rank()], CPU)
    except ConfigError as error:
        return str(error)
    return None


def test_ranks_that_agree_go_on() -> None:
    assert run_on_ranks(4, compare, [BASE] * 4) == [None] * 4


@pytest.mark.parametrize(
    ("changed", "ranks", "expected"),
    [
        ({"train.seed": "8"}, (3,), "train.seed is 7 on rank 0 (host {host}) and 8 on rank 3 (host {host}): start all"),
        (
            {"train.seed": "8", "optimizer.learning_rate": "0.1"},
            (1, 2),
            "optimizer.learning_rate is 0.001 on rank 0 (host {host}) and 0.1 on rank 1 (host {host}), and 1 more; "
            "1 more ranks differ: start all",
        ),
        ({"extra": "x"}, (2,), "extra is not there on rank 0 (host {host}) and x on rank 2 (host {host}): start all"),
    ],
)  # fmt: skip
def test_a_difference_is_one_line_on_every_rank(changed: dict[str, str], ranks: tuple[int, ...], expected: str) -> None:
    facts = [BASE | changed if rank in ranks else BASE for rank in range(4)]
    (first, *others) = run_on_ranks(4, compare, facts)
    assert first is not None
    assert first.startswith(f"the ranks do not agree: {expected.format(host=socket.gethostname())}")
    assert others == [first] * 3


def test_a_fact_that_a_rank_lacks_or_that_rank_0_has_alone_is_named() -> None:
    facts = [BASE | {"flash-attn": "2.8"}] + [BASE] * 3
    message = run_on_ranks(4, compare, facts)[2]
    assert message is not None
    assert "flash-attn is 2.8 on rank 0" in message
    assert "and not there on rank 1" in message
    assert "; 2 more ranks differ" in message


def measure() -> float:
    facts = {f"section.field_{i}": str(i) for i in range(80)}
    check_same(facts, CPU)
    began = time.perf_counter()
    for _ in range(20):
        check_same(facts, CPU)
    return (time.perf_counter() - began) / 20


def test_the_comparison_of_8_ranks_takes_milliseconds() -> None:
    """17 ms were seen, of 8 processes on 2 busy cores; once a run."""
    assert max(run_on_ranks(8, measure)) < 0.1


def refuse(by_rank: list[Exception | None]) -> tuple[type[UserError], str] | None:
    """What this rank raises when each rank meets its own error."""
    world = process_groups(1).world
    try:
        with refusing_together(world, Path("folder"), "; try again"):
            met = by_rank[world.rank]
            if met is not None:
                raise met
    except UserError as error:
        return type(error), str(error)
    return None


def test_nothing_is_refused_where_no_rank_meets_an_error() -> None:
    assert run_on_ranks(2, refuse, [None, None]) == [None, None]


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, FileError, DivergenceError, UserError])
def test_the_kind_of_an_error_is_the_same_on_every_rank(kind: type[UserError]) -> None:
    expected = (kind, f"it is damaged (rank 1 on {socket.gethostname()}); try again")
    assert run_on_ranks(2, refuse, [None, kind("it is damaged")]) == [expected, expected]


@pytest.mark.parametrize("name", ["a.bin", None])
def test_a_file_that_one_rank_cannot_use_is_a_file_error_on_every_rank(name: str | None) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", name)
    line = f"{name or 'folder'}: No space left on device (rank 0 on {socket.gethostname()}); try again"
    assert run_on_ranks(2, refuse, [error, None]) == [(FileError, line)] * 2


def test_the_lowest_rank_that_meets_an_error_is_the_one_that_is_told() -> None:
    expected = (DataError, f"a text (rank 1 on {socket.gethostname()}); try again")
    assert run_on_ranks(4, refuse, [None, DataError("a text"), ConfigError("a field"), None]) == [expected] * 4

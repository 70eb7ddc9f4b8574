from __future__ import annotations

import socket
import time

import pytest
import torch
import torch.distributed as dist

from megalibi.errors import UserError
from megalibi.parallel import check_same
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")
BASE = {"code": "1", "optimizer.learning_rate": "0.001", "train.seed": "7"}


def compare(by_rank: list[dict[str, str]]) -> str | None:
    try:
        check_same(by_rank[dist.get_rank()], CPU)
    except UserError as error:
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

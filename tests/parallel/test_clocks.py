from __future__ import annotations

import logging
import re
import time

import pytest
import torch.distributed as dist

from megalibi.parallel import clocks
from megalibi.parallel.clocks import compare_clocks, find_skew
from tests.support.ranks import run_on_ranks
from tests.support.tensors import process_groups

HOSTS = ["node1", "node2", "node2", "node3"]
BUSY_SECONDS = 60
"""For the collective, whose time is taken off."""


def test_spans_that_overlap_are_those_of_clocks_that_may_agree() -> None:
    assert find_skew((10.0, 11.0), (10.5, 99.0)) == 0
    assert find_skew((10.0, 90.0), (10.5, 11.0)) == 0
    assert find_skew((110.0, 111.0), (10.0, 12.0)) == 98
    assert find_skew((10.0, 12.0), (110.0, 111.0)) == -98


def compare(hosts: list[str], ahead_seconds: list[float]) -> list[str]:
    rank, said = dist.get_rank(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(clocks.__name__)
    logger.addHandler(handler)
    compare_clocks(process_groups(1).world, hosts, lambda: time.time() + ahead_seconds[rank])
    logger.removeHandler(handler)
    return said


@pytest.mark.parametrize(
    ("hosts", "ahead_seconds", "expected"),
    [
        (HOSTS, [0.0, 1.0, 1.0, -1.0], ""),
        (["node1"] * 4, [0.0, 100.0, 0.0, 0.0], ""),  # it is one clock
        (HOSTS, [0.0, 3600.0, 3600.0, 0.0], "the clock of node2 is at least 3600 s ahead of that of node1: the run"),
        (
            HOSTS,
            [0.0, 60.0, 60.0, -3600.0],
            "the clock of node3 is at least 3600 s behind that of node1, and 1 more differ",
        ),
    ],
)
def test_rank_0_names_the_host_whose_clock_is_off(hosts: list[str], ahead_seconds: list[float], expected: str) -> None:
    first, *others = run_on_ranks(4, compare, hosts, ahead_seconds)
    assert others == [[], [], []]
    if not expected:
        assert first == []
        return
    (said,) = first
    seconds = int(re.findall(r"\d+ s ", said)[0].removesuffix(" s "))
    assert 3600 - BUSY_SECONDS < seconds <= 3600
    assert said.replace(f"{seconds} s", "3600 s").startswith(expected)

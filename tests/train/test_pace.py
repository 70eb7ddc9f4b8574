from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest

from megalibi.parallel import Group, ProcessGroups
from megalibi.train.pace import SLOW_STEPS, SLOW_WINDOWS, Pace
from tests.support import slow_rank
from tests.support.jobs import ScriptJob, read_records, torchrun_environment, write_job

BURN_SECONDS = 0.025
STEPS = 31
HOSTS = ["a", "b", "c"]


def make_pace(*, every_steps: int = 10, slow_ratio: float = 1.5, first_step: int = 0) -> Pace:
    world = Group(rank=0, size=3, ranks=(0, 1, 2), handle=None)
    alone = Group(rank=0, size=1, ranks=(0,), handle=None)
    groups = ProcessGroups(world=world, tensor=alone, data=world)
    return Pace(groups, HOSTS, every_steps=every_steps, slow_ratio=slow_ratio, first_step=first_step)


def test_a_rank_with_a_burden_of_its_own_is_named_though_its_peer_waits_for_it_in_every_layer(tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        parallel={"tensor_parallel_size": 2},
        train={"steps": STEPS, "log_every_steps": 10},
        checkpoint={"every_steps": 0},
    )
    arguments = [str(BURN_SECONDS), "--config", str(config)]
    job = ScriptJob(Path(slow_rank.__file__), [arguments, arguments], tmp_path, torchrun_environment(2))
    job.succeed()
    compared = [record for record in read_records(tmp_path / "run") if "straggler_ratio" in record]
    assert [record["step"] for record in compared] == [10, 20, 30]
    assert {record["slowest_rank"] for record in compared} == {1}
    assert all(record["straggler_ratio"] > 1.5 for record in compared)
    (line,) = [line for line in job.read_log(0).splitlines() if " is slow: " in line]
    assert (
        f"WARNING [rank 0/2 on {socket.gethostname()}] rank 1 on {socket.gethostname()} is slow: its own work" in line
    )
    assert "is slow" not in job.read_log(1)


def test_reads_count_and_the_first_step_does_not() -> None:
    pace = make_pace(every_steps=2, first_step=4)
    pace.time_read(lambda: time.sleep(0.1))
    assert pace.tell() is None  # before step 5
    pace.end_step()
    assert pace.tell() is None  # before step 6, of which no step was measured yet
    pace.end_step()
    assert pace.tell() is None
    pace.time_read(lambda: time.sleep(0.04))
    pace.end_step()
    told = pace.tell()  # before step 8: steps 6 and 7
    assert told is not None
    assert 0.02 <= told < 0.05


def test_a_rank_is_named_once_when_it_stays_slow_and_when_it_is_so_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megalibi"), "propagate", True)
    pace = make_pace()
    for ratio in (2.0, 2.0, 1.2, 2.0, 2.0):
        pace.hear([0.1, 0.1, 0.1 * ratio])
    assert (pace.ratio, pace.slowest, caplog.messages) == (2.0, 2, [])
    for _ in range(SLOW_WINDOWS):
        pace.hear([0.1, 0.1, 0.2])
    assert [message.partition(": ")[0] for message in caplog.messages] == ["rank 2 on c is slow"]
    assert "takes 0.2 s a step, 2.0 times the median of the ranks, for 30 steps now" in caplog.messages[0]
    pace.hear([0.2, 0.1, 0.1])
    assert caplog.messages[1:] == ["rank 2 on c is not the slow one any more"]

    caplog.clear()
    often, never = make_pace(every_steps=1), make_pace(slow_ratio=0.0)
    for number in range(SLOW_STEPS):
        assert caplog.messages == [], number
        often.hear([0.1, 0.3, 0.1])
        never.hear([0.1, 0.3, 0.1])
    assert len(caplog.messages) == 1

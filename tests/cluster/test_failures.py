"""What breaks under a training over two hosts: what the ranks say, how soon they end, and that the next one goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megalibi.checkpoint import Checkpoint
from tests.cluster.machines.network import POLL_SECONDS, Hosts
from tests.cluster.machines.training import Launched, find_ranks, torchrun
from tests.support import hanging_rank
from tests.support.jobs import last_step, write_job

pytestmark = pytest.mark.cluster

NODES = ("node1", "node2")
LIMIT_SECONDS = 6.0
MARGIN_SECONDS = 12.0
"""For two ranks that look, let each other speak (a second and twice the limit's eighths each) and end, however busy."""
KILLED_SECONDS = 10.0
"""For the other ranks to end when one is killed, whose connections close."""
END_SECONDS = 60.0
"""For a launcher to end after its ranks, however busy the machine is."""


def test_a_host_is_cut_off_in_the_middle_of_a_step(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_job(tmp_path, train={"steps": 1_000_000}, runtime={"hang_timeout_seconds": LIMIT_SECONDS})
    launched = torchrun(hosts, NODES, 1, config)
    launched[0].wait_until(lambda: last_step(run) >= 5)
    hosts.cut("node2")
    cut_seconds = time.monotonic()
    while any(find_ranks(hosts, name) for name in NODES):
        assert time.monotonic() < cut_seconds + LIMIT_SECONDS + MARGIN_SECONDS, [each.output for each in launched]
        time.sleep(POLL_SECONDS)
    step = last_step(run)
    for rank, each in enumerate(launched):
        (line,) = [line for line in each.output.splitlines() if line.startswith("error: ")]
        # A cable that is pulled between the two messages of an exchange lets one rank go on by one place.
        assert re.match(
            rf"error: no progress for [0-9.]+ s after step ({step - 1}|{step}|{step + 1}), "
            r"runtime.hang_timeout_seconds=6: this rank waits in [^;]+; "
            r"(all 2 ranks are in collectives: look at the network between node1, node2|"
            r"(this rank|rank [01] on node[12]) is behind the others[^;]*); "
            rf"the stacks are in {run}/hang/rank_0000{rank}.txt; the same command goes on from the newest checkpoint "
            rf"\[rank {rank}/2 on node{rank + 1}\]$",
            line,
        ), line
    hosts.join("node2")
    assert [each.wait() for each in launched] == [1, 1]  # torchrun's code for any other than 0

    newest = Checkpoint.open(run).manifest.step
    assert step - 3 <= newest <= step  # every second step, and written while the next ones are done
    launched = torchrun(hosts, NODES, 1, config, f"train.steps={step + 4}")
    for each in launched:
        each.succeed()
    assert f"resumed from {run}/checkpoints/step_{newest:08d}" in launched[0].output
    assert last_step(run) == step + 4


@pytest.mark.parametrize(
    ("way", "place", "function"),
    [
        # The signal comes anywhere: in our loop, or while a checkpoint is saved.
        ("spin", r"[^;]+ \(.*\btests/support/hanging_rank\.py:\d+, spin_for_ever\)", "spin_for_ever"),
        ("read", r"a data read \(megalibi/data/loader\.py:\d+, [^)]*\)", "read_or_hang"),
    ],
    ids=["in Python", "in a data read"],
)
def test_a_rank_of_another_host_hangs(way: str, place: str, function: str, hosts: Hosts, tmp_path: Path) -> None:
    run, script = tmp_path / "run", Path(hanging_rank.__file__)
    config = write_job(tmp_path, train={"steps": 1_000_000}, runtime={"hang_timeout_seconds": LIMIT_SECONDS})
    launched = torchrun(hosts, NODES, 1, config, script=[str(script), way])
    launched[0].wait_until(lambda: last_step(run) >= 5)
    os.kill(find_ranks(hosts, "node2", script)[1], signal.SIGUSR2)
    hung_seconds = time.monotonic()
    while any(find_ranks(hosts, name, script) for name in NODES):
        assert time.monotonic() < hung_seconds + LIMIT_SECONDS + MARGIN_SECONDS, [each.output for each in launched]
        time.sleep(POLL_SECONDS)
    assert [each.wait() for each in launched] == [1, 1]
    (line,) = [line for line in launched[0].output.splitlines() if line.startswith("error: ")]
    assert re.search(
        rf"waits in \w+ of ranks 0-1 \(.*; rank 1 on node2 is in no collective: it is in {place}; ", line
    ), line
    assert function in (run / "hang" / "rank_00001.txt").read_text()


def test_a_rank_is_killed_on_another_host(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_job(tmp_path, train={"steps": 1_000_000})
    launched = torchrun(hosts, NODES, 1, config)
    launched[0].wait_until(lambda: last_step(run) >= 5)
    os.kill(find_ranks(hosts, "node2")[1], signal.SIGKILL)
    killed_seconds = time.monotonic()
    while any(find_ranks(hosts, name) for name in NODES):
        assert time.monotonic() < killed_seconds + KILLED_SECONDS, [each.output for each in launched]
        time.sleep(POLL_SECONDS)
    assert [each.wait() for each in launched] == [1, 1]
    (line,) = [line for line in launched[0].output.splitlines() if line.startswith("error: ")]
    address = re.escape(hosts.addresses["node2"])
    assert re.match(
        rf"error: a rank at {address} has ended or is cut off \(Connection (closed|reset) by peer\): ", line
    )
    assert "Signal 9 (SIGKILL) received by PID " in launched[1].output


def start_with_a_clock_that_is_off(hosts: Hosts, config: Path, shift_seconds: int) -> list[Launched]:
    """Start a run whose last host has a clock of its own; files get their times from the disk, as over NFS."""
    library = config.parent / "clock.so"
    source = Path(__file__).parent / "machines" / "clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    own = ["env", f"LD_PRELOAD={library}", f"CLOCK_SHIFT_SECONDS={shift_seconds}"]
    return torchrun(hosts, NODES, 1, config, before_the_last=own)


def test_a_host_whose_clock_is_off(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_job(tmp_path, train={"steps": 1_000_000}, runtime={"hang_timeout_seconds": LIMIT_SECONDS})
    launched = start_with_a_clock_that_is_off(hosts, config, 3600)
    launched[0].wait_until(lambda: last_step(run) >= 3)
    os.kill(find_ranks(hosts, "node2")[1], signal.SIGTERM)
    for each in launched:
        each.succeed()
    said = launched[0].output
    # What a collective took is taken off, for the clocks may have agreed within it.
    assert re.search(r"WARNING .*the clock of node2 is at least (3600|35\d\d) s ahead of that of node1: the run", said)
    stopped = last_step(run)
    assert f"stopped by SIGTERM after step {stopped}, checkpoint saved" in "".join(each.output for each in launched)

    launched = start_with_a_clock_that_is_off(hosts, config, -3600)
    launched[0].wait_until(lambda: last_step(run) >= stopped + 3)
    os.kill(find_ranks(hosts, "node2")[1], signal.SIGSTOP)
    assert launched[0].wait(LIMIT_SECONDS + END_SECONDS) == 1
    said = launched[0].output
    assert re.search(r"WARNING .*the clock of node2 is at least (3600|35\d\d) s behind that of node1: the run", said)
    assert f"resumed from {run}/checkpoints/step_{stopped:08d}" in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "; rank 1 on node2 gives no sign of life (after step " in line

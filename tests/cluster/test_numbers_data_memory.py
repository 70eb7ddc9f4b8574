"""Numbers, data, memory or a disk go wrong under a training over two hosts: what is said, and how the run goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from megalibi.checkpoint import Checkpoint
from tests.cluster.machines.network import POLL_SECONDS, Hosts
from tests.cluster.machines.training import Launched, find_ranks, torchrun
from tests.support import slow_rank
from tests.support.checkpoints import assert_whole
from tests.support.faults import change_byte
from tests.support.jobs import last_step, read_records, write_job
from tests.support.poison import BAD_STEP, write_job_with_a_bad_embedding, write_job_with_bad_text

pytestmark = pytest.mark.cluster

NODES = ("node1", "node2")
FOREVER = 1_000_000
SEEN_SECONDS = 30.0
"""Within which a fault has ended every rank, however busy the machine is: it takes a step and the end of a process."""
DATA_BYTES = 900_000_000
"""What a process of a host may take: a rank has 0.45 GB when its engine stands, and 1.5 GB in a step."""
BURN_SECONDS = 0.1
"""With what a rank is busy in each step: more than its work, however busy the machine is."""


def start(hosts: Hosts, config: Path, *overrides: str) -> list[Launched]:
    return torchrun(hosts, NODES, 1, config, *overrides)


def said(launched: list[Launched]) -> str:
    return "\n".join(each.output for each in launched)


def fail_soon(hosts: Hosts, launched: list[Launched]) -> str:
    """Wait for the end of all ranks, which must be near; return the one line of an error that they have said."""
    wait_for_the_end(hosts, launched)
    return error_of(launched)


def wait_for_the_end(hosts: Hosts, launched: list[Launched]) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while any(find_ranks(hosts, name) for name in NODES):
        assert time.monotonic() < deadline, said(launched)
        time.sleep(POLL_SECONDS)


def error_of(launched: list[Launched]) -> str:
    """Return the one line of an error; what is found before the ranks have met is said by one of each host."""
    lines = [error for each in launched for error in errors_of(each)]
    assert len({line.partition(" [rank ")[0] for line in lines}) == 1, lines
    return lines[0]


def errors_of(launched: Launched) -> list[str]:
    """Return the lines of errors that one host has said."""
    assert launched.wait() == 1  # torchrun's code for any other than 0
    return [line for line in launched.output.splitlines() if line.startswith("error: ")]


def test_a_loss_that_is_not_a_number_on_one_host(hosts: Hosts, tmp_path: Path) -> None:
    config = write_job_with_a_bad_embedding(tmp_path, steps=6)
    run = tmp_path / "run"
    launched = start(hosts, config)
    launched[0].wait_until(lambda: last_step(run) >= BAD_STEP)
    line = fail_soon(hosts, launched)
    assert line.startswith(f"error: step {BAD_STEP + 1} has loss nan and gradient norm inf: the run has diverged and ")
    assert re.search(r"it arose on rank 1 on node2 \(micro batch \d: sample \d+\)", line)
    assert assert_whole(Checkpoint.open(run).path) == 2
    (skip,) = re.findall(r"'(data\.skip=\[.*?\])'", line)
    for each in start(hosts, config, skip):
        each.succeed()
    assert last_step(run) == 6
    assert not any(record.get("skipped") for record in read_records(run))


def test_a_loss_that_leaps_up(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = start(hosts, write_job_with_bad_text(tmp_path))
    launched[0].wait_until(lambda: last_step(run) >= 16)
    line = fail_soon(hosts, launched)
    assert re.search(
        r"WARNING .*step 14 has loss .*, a spike above .*: goes back to step_00000012 and ", said(launched)
    )
    assert re.match(r"error: step 18 has loss .*, and there is train.max_rollbacks=1: the run stops; ", line)


def test_a_host_that_is_slow(hosts: Hosts, tmp_path: Path) -> None:
    config = write_job(tmp_path, train={"steps": 31, "log_every_steps": 10}, checkpoint={"every_steps": 0})
    launched = torchrun(hosts, NODES, 1, config, script=[slow_rank.__file__, str(BURN_SECONDS)])
    for each in launched:
        each.succeed()
    compared = [record for record in read_records(tmp_path / "run") if "straggler_ratio" in record]
    assert [(record["step"], record["slowest_rank"]) for record in compared] == [(10, 1), (20, 1), (30, 1)]
    (line,) = [line for line in said(launched).splitlines() if " is slow: " in line]
    assert (
        "WARNING [rank 0/2 on node1] rank 1 on node2 is slow: its own work, reading data and forward passes, " in line
    )
    assert "for 30 steps now" in line


def test_a_token_file_that_changes_under_the_run_and_before_the_next(hosts: Hosts, tmp_path: Path) -> None:
    config = write_job(tmp_path, train={"steps": FOREVER})
    launched = start(hosts, config)
    launched[0].wait_until(lambda: last_step(tmp_path / "run") >= 3)
    change_byte(tmp_path / "tokens.bin", 10_000)
    line = fail_soon(hosts, launched)
    stopped = last_step(tmp_path / "run")
    assert f"{tmp_path}/tokens.bin: changed while it is being read (of the same size): put the file back" in line
    assert f"; stopped after step {stopped}, checkpoint saved; the same command goes on when the data is mended" in line
    assert assert_whole(Checkpoint.open(tmp_path / "run").path) == stopped

    line = error_of(start(hosts, config))
    assert f"error: data.train={tmp_path}/tokens (20,000 tokens in 21 documents, sha256 " in line
    assert "must be the text that the checkpoint " in line
    change_byte(tmp_path / "tokens.bin", 10_000)
    for each in start(hosts, config, f"train.steps={stopped + 2}"):
        each.succeed()
    assert last_step(tmp_path / "run") == stopped + 2


def test_a_host_whose_memory_runs_out(hosts: Hosts, tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        model={"hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
        train={"global_batch_size": 128, "micro_batch_size": 64, "precision": "fp32"},
        data={"seq_length": 2_048, "train": str(tmp_path / "tokens")},
    )
    launched = torchrun(hosts, NODES, 1, config, before_the_last=["prlimit", f"--data={DATA_BYTES}"])
    launched[0].wait_until((tmp_path / "run" / "config.yaml").exists)  # the engine stands
    wait_for_the_end(hosts, launched)
    (lost,), (line,) = (errors_of(each) for each in launched)
    assert lost.startswith(f"error: a rank at {hosts.addresses['node2']} has ended or is cut off (")
    size = r"\d+\.\d [MG]B"
    cause = "error: not enough memory on node2, the host's"
    assert re.match(
        rf"{cause}: {size} more were asked for; a rank of this run is planned with {size} "
        rf"at the peak of a step .*; less is planned with train\.micro_batch_size=32 \({size}\)",
        line,
    ), line


def test_a_disk_that_is_full_for_a_while(hosts: Hosts, tmp_path: Path) -> None:
    filler, run = hosts.small_disk / "filler", hosts.look_at(hosts.small_disk / "run")
    config = write_job(tmp_path, train={"steps": FOREVER, "output_dir": str(hosts.small_disk / "run")})

    def fill() -> None:
        hosts.run("node2", "dd", "if=/dev/zero", f"of={filler}", "bs=64k", check=False)

    launched = start(hosts, config)
    launched[0].wait_until(lambda: (run / "checkpoints" / "latest").exists())
    fill()
    line = fail_soon(hosts, launched)
    assert line.startswith("error: checkpoint not written, the one before it stays: ")
    assert "No space left on device" in line
    saved = assert_whole(Checkpoint.open(run).path)
    hosts.look_at(filler).unlink()

    launched = start(hosts, config, "checkpoint.every_steps=0")
    launched[0].wait_until(lambda: last_step(run) >= saved + 3)
    fill()
    warning = f"WARNING [rank 0/2 on node1] {hosts.small_disk}/run/metrics.jsonl cannot be written: No space left on"
    launched[0].wait_until(lambda: warning in launched[0].output)
    hosts.look_at(filler).unlink()
    before = last_step(run)
    launched[0].wait_until(lambda: last_step(run) >= before + 3)
    os.kill(find_ranks(hosts, "node1")[0], signal.SIGTERM)
    for each in launched:
        each.succeed()
    steps = [record["step"] for record in read_records(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert assert_whole(Checkpoint.open(run).path) == steps[-1]

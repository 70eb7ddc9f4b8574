"""Ranks that do not come, or come anew: what real ranks say, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.jobs import LAUNCHER_VARIABLES, POLL_SECONDS, SCRIPT, Job, read_records, write_job
from tests.support.ranks import find_free_port

TIMEOUT_SECONDS = 240.0
WAIT = "parallel.timeout_minutes=0.2"


def one_host(ranks: list[int], world_size: int) -> list[dict[str, str]]:
    port = str(find_free_port())
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
         "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in ranks
    ]  # fmt: skip


def errors_of(job: Job, num_ranks: int) -> list[str]:
    assert job.wait() == [1] * num_ranks, job.output
    assert "Traceback" not in job.output
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


def test_the_ranks_of_a_host_whose_rank_0_never_starts_say_it(tmp_path: Path) -> None:
    job = Job(write_job(tmp_path), WAIT, environments=one_host([1], 2))
    (line,) = errors_of(job, 1)
    assert line.startswith("error: nobody answers at 127.0.0.1:")
    assert "[rank 1/2 on " in line


def test_a_missing_rank_is_said_once_on_a_host(tmp_path: Path) -> None:
    config = write_job(tmp_path, train={"global_batch_size": 8})
    job = Job(config, WAIT, environments=one_host([0, 1, 2], 4))
    (line,) = errors_of(job, 3)
    assert line.startswith("error: after parallel.timeout_minutes=0.2 rank 3 of 4 is missing (hosts that are there: ")


def test_torchrun_starts_ranks_anew_after_one_was_killed(tmp_path: Path) -> None:
    """The agent keeps one store for all starts, in which the former ranks have left their keys."""
    config, run, log = write_job(tmp_path, train={"steps": 40}), tmp_path / "run", tmp_path / "log"
    pids = tmp_path / "pids"
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"open({str(pids)!r}, 'a').write(f\"{{os.environ['RANK']}} {{os.getpid()}}\\n\")\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["--master_port", str(find_free_port()), str(script), "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    try:
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(POLL_SECONDS)
        os.kill(int(dict(line.split() for line in pids.read_text().splitlines())["1"]), signal.SIGKILL)
        assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()
    finally:
        process.terminate()  # which passes it on to its ranks
    assert len(pids.read_text().splitlines()) == 4
    assert "resumed from" in log.read_text()
    assert [record["step"] for record in read_records(run)] == list(range(1, 41))

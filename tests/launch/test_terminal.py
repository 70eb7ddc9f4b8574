"""Training does not depend on who reads its output: real shells that close it, and the end of the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalibi.checkpoint import find_checkpoint
from tests.support.jobs import LAUNCHER_VARIABLES, POLL_SECONDS, SCRIPT, Job, last_step, read_records, write_job
from tests.support.ranks import find_free_port
from tests.support.warm_python import warm_python

TIMEOUT_SECONDS = 240.0
STEPS = 6
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --master_port"
SHELL_LINES = {
    "only the first line is read": "{warm} {script} 2> {folder}/errors | head -1",
    "nothing is open": "{python} {script} <&- >&- 2>&-",
    "no errors": "{python} {script} 2>&-",
    "a full disk": "{warm} {script} > /dev/full 2> /dev/full",
    "two ranks, the first line": "{warm} {torchrun} {port} {script} 2>&1 | head -1",
    "two ranks, nothing is open": "{python} {torchrun} {port} {script} >&- 2>&-",
}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Path]]:
    """Exit code and folder of each line of a shell; they run at the same time, for some import torch.

    Where a stream is closed, that is to be so from a Python's first moment.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    processes = {}
    for case, line in SHELL_LINES.items():
        folder = tmp_path_factory.mktemp("shell")
        config = write_job(folder, train={"steps": STEPS})
        script = f"{SCRIPT} --config {config}"
        pythons = {"python": sys.executable, "warm": warm_python(), "torchrun": TORCHRUN, "port": find_free_port()}
        command = line.format(**pythons, script=script, folder=folder)
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command], env=environment, stdout=subprocess.DEVNULL
        )
        processes[case] = process, folder / "run"
    return {case: (process.wait(TIMEOUT_SECONDS), run) for case, (process, run) in processes.items()}


@pytest.mark.parametrize("case", SHELL_LINES)
def test_a_run_whose_output_nobody_takes_trains_to_the_end(codes: dict[str, tuple[int, Path]], case: str) -> None:
    code, run = codes[case]
    assert code == 0
    assert [record["step"] for record in read_records(run)] == list(range(1, STEPS + 1))
    assert find_checkpoint(run / "checkpoints") == run / f"checkpoints/step_{STEPS:08d}"


@pytest.mark.parametrize(("options", "exit_codes"), [([], [0]), (["--stopped-code=75"], [75, 0])])
def test_the_end_of_the_terminal_saves(tmp_path: Path, options: list[str], exit_codes: list[int]) -> None:
    config, world_size = write_job(tmp_path, checkpoint={"every_steps": 0}), len(exit_codes)
    job = Job(config, "train.steps=1000000", *options, world_size=world_size)
    job.wait_until(lambda: last_step(tmp_path / "run") > 2)
    job.signal(signal.SIGHUP, world_size - 1)
    assert job.wait() == exit_codes, job.output
    stopped = last_step(tmp_path / "run")
    assert find_checkpoint(tmp_path / "run/checkpoints") == tmp_path / f"run/checkpoints/step_{stopped:08d}"
    assert f"stopped by SIGHUP after step {stopped}" in job.read_log(world_size - 1)


def test_the_end_of_the_terminal_of_torchrun_saves(tmp_path: Path) -> None:
    config = write_job(tmp_path, checkpoint={"every_steps": 0})
    command = [
        sys.executable,
        *TORCHRUN.split(),
        str(find_free_port()),
        str(SCRIPT),
        "--config",
        str(config),
        "train.steps=1000000",
    ]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    while last_step(tmp_path / "run") < 3:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(POLL_SECONDS)
    os.killpg(process.pid, signal.SIGHUP)  # as the system does: to all at once, and torchrun passes it on
    process.wait(TIMEOUT_SECONDS)
    stopped = last_step(tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint == tmp_path / f"run/checkpoints/step_{stopped:08d}", (tmp_path / "log").read_text()

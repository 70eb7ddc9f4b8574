"""Real ranks that hang, each in a way of its own: all end in time, and say who holds them up and where it is."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from megalibi.parallel import build_process_groups
from megalibi.runtime.hang import SIGNS_FOLDER, STACKS_FOLDER, Watchdog
from megalibi.runtime.hang.watchdog import PROGRESS_BYTES
from tests.support import hanging_rank, jobs
from tests.support.jobs import ScriptJob, last_step, torchrun_environment, write_job
from tests.support.processes import CONTEXT
from tests.support.ranks import find_free_port

LIMIT_SECONDS = 5.0
MARGIN_SECONDS = 8.0
"""For two ranks that look, wait for each other's words and end, on a machine that does other things as well."""
SAVING_SECONDS = 8.0
"""The limit where a rank must not be taken for one that hangs, however busy the machine is."""
HOST = socket.gethostname()
ACCUSED = f"rank 1 on {HOST} is in no collective: it is in "
SILENT = f"rank 1 on {HOST} gives no sign of life (after step "


def start(folder: Path, way: str) -> ScriptJob:
    """Start two ranks of an endless run, and return when they have taken some steps, and their watchdogs know it."""
    config = write_job(
        folder,
        parallel={"tensor_parallel_size": 2},
        train={"steps": 1_000_000},
        checkpoint={"every_steps": 0},
        runtime={"hang_timeout_seconds": LIMIT_SECONDS},
    )
    arguments = [way, "--config", str(config)]
    job = ScriptJob(Path(hanging_rank.__file__), [arguments, arguments], folder, torchrun_environment(2))
    run, counts = folder / "run", [0, 0]
    for _ in range(2):  # a watchdog is set anew after it has given its sign
        job.wait_until(lambda before=tuple(counts): all(count_signs(run, rank) > before[rank] for rank in range(2)))
        counts = [count_signs(run, rank) for rank in range(2)]
    return job


def count_signs(run: Path, rank: int) -> int:
    """Return how many signs a rank has given, 0 before one that tells of a step."""
    path = run / SIGNS_FOLDER / f"rank_{rank:05d}.json"
    found = re.search('"number": ([0-9]+),.*"step": [1-9]', path.read_text() if path.exists() else "")
    return int(found[1]) if found else 0


WAYS = {
    "sleep": ([1, 1], ACCUSED, "sleep_for_ever"),
    "spin": ([1, 1], ACCUSED, "spin_for_ever"),
    "read": ([1, 1], f"{ACCUSED}a data read (megalibi/data/loader.py:", "read_or_hang"),
    "lock": ([1, 1], SILENT, "keep_the_lock"),
    "stop": ([1, -signal.SIGKILL], SILENT, ""),
}
"""The exit codes of the ranks, whom rank 0 names, and the function in which rank 1 is."""


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory: a busy disk would keep a watchdog in the writing of its sign, beyond a limit of seconds."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def hung(memory: Path, saving: object) -> dict[str, tuple[ScriptJob, Path]]:
    """A job for each way to hang, and their folders; they wait beside each other, and beside the ranks that save."""
    found = {}
    for way in WAYS:
        folder = memory / way
        folder.mkdir()
        job = start(folder, "sleep" if way == "stop" else way)
        job.signal(signal.SIGSTOP if way == "stop" else signal.SIGUSR2, rank=1)
        if way == "sleep":  # whoever tries to stop it in order
            time.sleep(LIMIT_SECONDS / 4)
            job.signal(signal.SIGTERM, rank=0)
            job.signal(signal.SIGTERM, rank=1)
        found[way] = job, folder / "run"
    return found


@pytest.mark.parametrize("way", WAYS)
def test_ranks_end_when_one_hangs_and_say_who_and_where(
    hung: dict[str, tuple[ScriptJob, Path]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job, run), (codes, blamed, where) = hung[way], WAYS[way]
    monkeypatch.setattr(jobs, "JOB_TIMEOUT_SECONDS", LIMIT_SECONDS + MARGIN_SECONDS)
    assert job.wait() == codes, job.output

    (error,) = lines_of(job, 0)
    assert f" s after step {last_step(run)}, runtime.hang_timeout_seconds={LIMIT_SECONDS:g}: " in error
    assert re.search(r": this rank waits in \w+ of ranks 0-1 \((megalibi|deepspeed)/\S+.py:[0-9]+, \w+\); ", error)
    assert blamed in error
    assert error.endswith(f"[rank 0/2 on {HOST}]")
    stacks = [run / STACKS_FOLDER / f"rank_{rank:05d}.txt" for rank in range(2)]
    assert f"the stacks are in {stacks[0]}; " in error
    assert "rank 0/2" in stacks[0].read_text()
    assert " in take_next_step\n" in stacks[0].read_text()
    if way in ("lock", "stop"):  # nothing of Python's runs there any more
        assert not lines_of(job, 1)
        assert where in job.read_log(1)
        return
    (own,) = lines_of(job, 1)
    assert "; this rank is in no collective; " in own
    assert f" in {where}\n" in stacks[1].read_text()
    if way != "read":  # a signal comes anywhere, and reads are a thread's
        assert f"hanging_rank.py:{line_of(stacks[1], where)}, {where})" in error


def line_of(stacks: Path, function: str) -> str:
    (line,) = re.findall(f'hanging_rank.py", line ([0-9]+) in {function}\n', stacks.read_text())
    return str(line)


def lines_of(job: ScriptJob, rank: int) -> list[str]:
    return [line for line in job.read_log(rank).splitlines() if line.startswith("error: ")]


def save_on_rank_1(folder: Path, rank: int, port: int) -> None:
    """Wait on rank 0 for a save of rank 1 that takes longer than the limit; then hang on both."""
    import torch.distributed as dist

    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with Watchdog(SAVING_SECONDS, folder, build_process_groups(1).world, [HOST] * 2) as watchdog:
        watchdog.mark(1)
        began = time.monotonic()
        with (folder / f"saved{rank}").open("wb", buffering=0) as file:
            while rank == 1 and time.monotonic() < began + 1.5 * SAVING_SECONDS:
                file.write(bytes(PROGRESS_BYTES))
                file.seek(0)
                time.sleep(SAVING_SECONDS / 8)
        dist.barrier()
    dist.barrier()
    assert not (folder / STACKS_FOLDER).exists()
    assert not (folder / SIGNS_FOLDER).exists()
    dist.barrier()
    with Watchdog(SAVING_SECONDS, folder, build_process_groups(1).world, [HOST] * 2) as watchdog:
        watchdog.mark(1)
        time.sleep(100 * SAVING_SECONDS)


@pytest.fixture(scope="module")
def saving(memory: Path) -> tuple[Path, list[BaseProcess]]:
    """Two ranks, of which one waits for the other's save, and their folder."""
    folder, port = memory / "saving", find_free_port()
    folder.mkdir()
    ranks = [CONTEXT.Process(target=save_on_rank_1, args=(folder, rank, port), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return folder, ranks


def test_a_slow_save_is_progress_for_the_rank_and_for_those_who_wait_for_it(
    saving: tuple[Path, list[BaseProcess]],
) -> None:
    folder, ranks = saving
    for number, rank in enumerate(ranks):
        rank.join(60)
        log = (folder / f"rank{number}.log").read_text()
        assert rank.exitcode == 1, log
        assert "Traceback" not in log, log
        assert "; all 2 ranks are equally far; the stacks are in " in log
    assert (folder / SIGNS_FOLDER / "rank_00001.json").exists()

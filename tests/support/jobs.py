"""Real jobs for tests: each rank is a process of its own that runs a script, and can be signalled and killed.

The ranks are forked from a server that has their imports (``tests.support.processes``); from there on they are what a
launcher starts.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalibi.config import Config, save_config
from tests.support.processes import CONTEXT
from tests.support.ranks import find_free_port
from tests.support.runs import make_config, write_tokens

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.py"
JOB_TIMEOUT_SECONDS = 240.0
POLL_SECONDS = 0.01
MEASURED = {"step_seconds", "tokens_per_second", "model_tflops_per_second", "model_tflops_per_second_causal",
            "memory_bytes", "memory_peak_bytes", "validation_seconds", "straggler_ratio", "slowest_rank"}  # fmt: skip
"""What no two runs have in common."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def write_job(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write token files and the configuration of a small run in ``folder``; return the configuration's path."""
    prefix = write_tokens(folder, num_tokens=20_000)
    small = {
        "train": {"steps": 6, "global_batch_size": 4, "output_dir": str(folder / "run"), "log_every_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 2},
        # The rate of a step does not depend on train.steps, so that a run can be made longer.
        "optimizer": {"decay_steps": 40},
    }
    for section, values in sections.items():
        small.setdefault(section, {}).update(values)
    config: Config = make_config(prefix, **small)
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml"


def torchrun_environment(world_size: int) -> list[dict[str, str]]:
    """Return what torchrun tells each rank of one host; a process alone is told nothing."""
    if world_size == 1:
        return [{}]
    port = str(find_free_port())
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
         "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world_size)
    ]  # fmt: skip


class ScriptJob:
    """The ranks of one run of a script.

    Args:
        script: What each rank runs.
        arguments: Of the command line, by rank.
        folder: Where what the ranks print goes, a file for each.
        environments: What a launcher tells each rank.
    """

    _count = 0

    def __init__(
        self,
        script: Path,
        arguments: Sequence[Sequence[str]],
        folder: Path,
        environments: Sequence[Mapping[str, str]],
    ) -> None:
        ScriptJob._count += 1
        self.logs: list[Path] = []
        self.processes = []
        for rank, environment in enumerate(environments):
            log = folder / f"job{ScriptJob._count}_rank{rank}.log"
            process = CONTEXT.Process(
                target=_run_rank, args=(str(script), list(arguments[rank]), dict(environment), str(log)), daemon=True
            )
            process.start()
            self.logs.append(log)
            self.processes.append(process)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """Kill every rank with SIGKILL."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self) -> list[int]:
        """Return the exit code of each rank when all have ended."""
        deadline = time.monotonic() + JOB_TIMEOUT_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"exit codes after {JOB_TIMEOUT_SECONDS} s: {codes}\n{self.output}")
        return codes

    def succeed(self) -> None:
        """Wait for the end, and for 0 from every rank."""
        codes = self.wait()
        assert not any(codes), f"{codes}\n{self.output}"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds while every rank runs."""
        deadline = time.monotonic() + JOB_TIMEOUT_SECONDS
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL_SECONDS)

    def read_log(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"--- rank {rank}\n{self.read_log(rank)}" for rank in range(len(self.logs)))


class Job(ScriptJob):
    """The ranks of one run of launch/pretrain.py.

    Args:
        config: Path of the configuration; what the ranks print goes into files beside it.
        overrides: ``section.field=value`` strings.
        world_size: Number of ranks, told as torchrun does.
        environments: What another launcher tells each rank.
        rank_overrides: What each rank alone is told, as on hosts with files of their own.
    """

    def __init__(
        self,
        config: Path,
        *overrides: str,
        world_size: int = 1,
        environments: Sequence[Mapping[str, str]] | None = None,
        rank_overrides: Sequence[Sequence[str]] | None = None,
    ) -> None:
        environments = environments or torchrun_environment(world_size)
        arguments = [
            ["--config", str(config), *overrides, *own] for own in rank_overrides or [[] for _ in environments]
        ]
        super().__init__(SCRIPT, arguments, config.parent, environments)


def run_job(config: Path, *overrides: str, world_size: int = 1) -> Job:
    """Run a job to a good end."""
    job = Job(config, *overrides, world_size=world_size)
    job.succeed()
    return job


def _run_rank(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the suite was started by nohup, and tests send it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # torch was loaded before the variable was set
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))  # as Python does for a script, and runpy does not
    runpy.run_path(script, run_name="__main__")


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, none if there is no file, without a last one that is being written."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run)), default=0)


def exact_records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what was measured: what must be equal bit for bit."""
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in read_records(run)]

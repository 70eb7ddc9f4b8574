"""How a study starts its processes, and what each may use: its share of the cores, its GPUs."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megalibi.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a study starts its processes, and on what."""

    pretrain: Path
    """launch/pretrain.py."""
    evaluate: Path
    """tools/evaluate.py."""
    environment: Mapping[str, str]
    """Of every process."""
    cores: int
    """That the processes share."""
    gpus: int = 0
    """The same; 0: they compute on the CPU."""
    jobs: int = 1
    """Processes, or launchers with their ranks, at once."""
    ranks: int = 1
    """Of a training."""
    launcher: tuple[str, ...] = ()
    """What to put before pretrain.py instead of our choice."""

    def __post_init__(self) -> None:
        """Check what does not fit."""
        for name in ("jobs", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: a number of at least 1 is")
        if self.gpus and self.jobs * self.ranks > self.gpus:
            raise ConfigError(
                f"{self.jobs} trainings at once of {self.ranks} ranks each need {self.jobs * self.ranks} GPUs, and "
                f"there are {self.gpus}: run fewer at once (--jobs), or on fewer ranks (study.ranks)"
            )

    def launch(self, slot: int) -> list[str]:
        """Return what starts pretrain.py on the ranks of a training, without its arguments."""
        if self.launcher:
            return [*self.launcher, str(self.pretrain)]
        if self.ranks == 1:
            return [sys.executable, str(self.pretrain)]
        gpus = ",".join(map(str, self._gpus(slot, self.ranks)))
        where = ["--include", f"localhost:{gpus}"] if gpus else ["--num_accelerators", str(self.ranks)]
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        return [*deepspeed, *where, "--master_port", str(_find_free_port()), str(self.pretrain)]

    def environment_of(self, slot: int, ranks: int) -> dict[str, str]:
        """Return the environment of the ``slot``-th process: its share of the cores, and its GPU."""
        threads = max(1, self.cores // (self.jobs * ranks))
        environment = {"OMP_NUM_THREADS": str(threads), **self.environment}
        if self.gpus and ranks == 1 and self.jobs > 1:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else list(map(str, range(self.gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = names[slot]
        return environment

    def _gpus(self, slot: int, ranks: int) -> range:
        return range(slot * ranks, (slot + 1) * ranks) if self.gpus else range(0)


def describe_machine(
    root: Path, environment: Mapping[str, str], *, jobs: int, ranks: int, launcher: str = ""
) -> Machine:
    """Return how processes are started here: each gets its share of the cores unless OMP_NUM_THREADS is set already.

    Args:
        root: Folder with launch/ and tools/.
        environment: Of every process.
        jobs: Processes at once.
        ranks: Of a training.
        launcher: Command that starts the ranks, before the script; empty: our choice.

    Raises:
        ConfigError: There are too few GPUs for that, or the launcher is no command.
    """
    try:
        words = tuple(shlex.split(launcher))
    except ValueError as error:  # a quote without its other
        raise ConfigError(f"--launcher={launcher} is not allowed: {error}, a command is") from error
    return Machine(
        pretrain=root / "launch" / "pretrain.py",
        evaluate=root / "tools" / "evaluate.py",
        environment=environment,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=0 if environment.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count(),
        jobs=jobs,
        ranks=ranks,
        launcher=words,
    )


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

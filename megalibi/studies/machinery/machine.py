"""How a study starts its processes on this machine, and what each may use: a share of the cores, and GPUs."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import megalibi
from megalibi.errors import ConfigError

COMMAND_SCRIPT = str(Path(megalibi.__file__).with_name("cli") / "script" / "megalibi_command.py")
"""The command line as a file: a folder called megalibi beside a user's data cannot hide it, as it would ``-m``."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The programs that a study starts, and the cores and GPUs that its processes share."""

    environment: Mapping[str, str]
    """The environment of every process."""
    cores: int
    """CPU cores that the processes share."""
    gpus: int = 0
    """GPUs that the processes share; with 0 they compute on the CPU."""
    jobs: int = 1
    """How many processes, or launchers with their ranks, run at once."""
    ranks: int = 1
    """Ranks of a training or of a turn."""
    shares_gpus: bool = False
    """Whether processes of one rank may share a GPU where there are more of them than GPUs. Only a study that measures
    no time asks for it."""
    launcher: tuple[str, ...] = ()
    """The user's own command that starts the ranks of a training; empty: this machine's choice."""

    def __post_init__(self) -> None:
        """Check that the processes fit the machine."""
        for name, value in (("--jobs", self.jobs), ("study.ranks", self.ranks)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        is_shared = self.shares_gpus and self.ranks == 1
        if self.gpus and self.jobs * self.ranks > self.gpus and not is_shared:
            raise ConfigError(
                f"{self.jobs} trainings at once of {self.ranks} ranks each need {self.jobs * self.ranks} GPUs, and "
                f"there are {self.gpus}: run fewer at once (--jobs), or on fewer ranks (study.ranks)"
            )

    def launch(self, slot: int, *command: str) -> list[str]:
        """Return the words that start a command of megalibi on the ranks of a training, before its own arguments.

        Args:
            slot: The place of this process among those that run at once, from 0 on; it decides on the GPUs.
            command: The words after ``megalibi``, such as ``pretrain``.
        """
        if self.launcher:
            return [*self.launcher, COMMAND_SCRIPT, *command]
        if self.ranks == 1:
            return self.start(*command)
        gpus = ",".join(map(str, self._gpus(slot, self.ranks)))
        where = ["--include", f"localhost:{gpus}"] if gpus else ["--num_accelerators", str(self.ranks)]
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        return [*deepspeed, *where, "--master_port", str(_find_free_port()), COMMAND_SCRIPT, *command]

    def start(self, *command: str) -> list[str]:
        """Return the words that start a command of the installed package as one process of this interpreter.

        Args:
            command: The words after ``megalibi``, such as ``evaluate``.
        """
        return [sys.executable, COMMAND_SCRIPT, *command]

    def environment_of(self, slot: int, ranks: int) -> dict[str, str]:
        """Return the environment of the ``slot``-th process, which has its share of the cores and its GPU."""
        threads = max(1, self.cores // (self.jobs * ranks))
        environment = {"OMP_NUM_THREADS": str(threads), **self.environment}
        if self.gpus and ranks == 1 and self.jobs > 1:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else list(map(str, range(self.gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        return environment

    def _gpus(self, slot: int, ranks: int) -> range:
        return range(slot * ranks, (slot + 1) * ranks) if self.gpus else range(0)


def detect_machine(
    environment: Mapping[str, str], *, jobs: int, ranks: int, launcher: str = "", shares_gpus: bool = False
) -> Machine:
    """Return this machine as a study may use it. Processes share the cores unless OMP_NUM_THREADS is set already.

    Args:
        environment: The environment of every process.
        jobs: How many processes run at once.
        ranks: Ranks of each training.
        launcher: The command that starts the ranks, such as ``srun python`` or ``deepspeed --num_gpus 8``; a script's
            path and arguments are put behind it. Empty means our choice.
        shares_gpus: Whether processes of one rank may share a GPU where there are more of them than GPUs.

    Raises:
        ConfigError: There are too few GPUs for so many processes, or the launcher is not a command.
    """
    try:
        words = tuple(shlex.split(launcher))
    except ValueError as error:  # a quote without its other
        raise ConfigError(f"--launcher={launcher}: must be a command ({error})") from error
    return Machine(
        environment=environment,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=0 if environment.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count(),
        jobs=jobs,
        ranks=ranks,
        shares_gpus=shares_gpus,
        launcher=words,
    )


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

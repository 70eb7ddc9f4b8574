"""Trainings on hosts: a small run, the environment of its launcher, and where its ranks are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.machines.network import POLL_SECONDS, Hosts
from tests.support.jobs import LAUNCHER_VARIABLES, SCRIPT, write_job

ROOT = Path(__file__).parents[3]
STEPS = 6
RUN_SECONDS = 180.0
"""After which a launcher is taken to hang."""
FORWARDED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""What every rank is told: sums of the same order everywhere, and no GPU."""
_RANK = (b"RANK=", b"OMPI_COMM_WORLD_RANK=")


def make_job(folder: Path, tensor_parallel_size: int = 2) -> Path:
    """Write a run of a few steps for four ranks or eight; return its configuration's path."""
    parallel = {"tensor_parallel_size": tensor_parallel_size}
    model = {"ffn_hidden_size": 192}  # 4 x hidden_size, the one width that every format of other programs has
    return write_job(folder, parallel=parallel, model=model, train={"steps": STEPS, "global_batch_size": 8})


def make_environment() -> dict[str, str]:
    """Return the variables of a launcher: those of this process, without what a launcher has told it."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    programs = str(Path(sys.executable).parent)
    return own | FORWARDED | {
        "PATH": f"{programs}:{own['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # A host's own folder in place of /tmp, which is shared: hosts of two sessions have the same names and numbers.
        "OMPI_MCA_orte_tmpdir_base": "/dev/shm",
        # Else the first rank of every host is bound to the machine's first core.
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        # Where one rank has ended the others get SIGKILL at once: by default seconds after SIGTERM.
        "OMPI_MCA_odls_base_sigkill_timeout": "0",
    }  # fmt: skip


class Launched:
    """A launcher that runs on one of the hosts.

    Args:
        hosts: They are on.
        host: On which it runs.
        command: The launcher and what it starts.
        folder: In which it runs, and which gets its output.
        environment: Variables beside those of ``make_environment``.
    """

    _count = 0

    def __init__(
        self,
        hosts: Hosts,
        host: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        Launched._count += 1
        self.log = folder / f"launched{Launched._count}.log"
        self.began = time.monotonic()
        self.process = hosts.start(
            host, command, folder=folder, output=self.log, environment=make_environment() | dict(environment or {})
        )

    @property
    def output(self) -> str:
        """What it and the ranks have printed."""
        return self.log.read_text()

    def wait(self, timeout: float = RUN_SECONDS) -> int:
        """Return the launcher's exit code when it has ended."""
        return self.process.wait(timeout)

    def succeed(self, timeout: float = RUN_SECONDS) -> None:
        """Wait for the end, and for an exit code of 0."""
        code = self.wait(timeout)
        assert code == 0, f"{code}\n{self.output}"

    def wait_until(self, condition: Callable[[], bool], timeout: float = RUN_SECONDS) -> None:
        """Wait until something holds while the launcher runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"{self.process.returncode}\n{self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL_SECONDS)


def deepspeed(hosts: Hosts, slots: Mapping[str, int], config: Path, *overrides: str) -> Launched:
    """Start ``deepspeed --hostfile`` on the first of the hosts, which reaches the others by pdsh and ssh."""
    hostfile = config.parent / "hostfile"
    hostfile.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
    # pdsh hands on PYTHON* alone; DeepSpeed reads the rest here.
    variables = "\n".join(f"{name}={value}" for name, value in FORWARDED.items())
    (config.parent / ".deepspeed_env").write_text(variables)
    command = ["deepspeed", "--hostfile", str(hostfile), str(SCRIPT), "--config", str(config), *overrides]
    return Launched(hosts, next(iter(slots)), command, config.parent)


def torchrun(
    hosts: Hosts,
    names: Sequence[str],
    ranks_per_host: int,
    config: Path,
    *overrides: str,
    of_the_last: Sequence[str] = (),
    before_the_last: Sequence[str] = (),
    script: Sequence[str] = (str(SCRIPT),),
) -> list[Launched]:
    """Start torchrun on every host; the last one is told more overrides than the others, or started by a command.

    Args:
        hosts: They are on.
        names: The hosts of the job; the first one is that of rank 0.
        ranks_per_host: How many each gets.
        config: The run's configuration; its folder gets what they print.
        overrides: Of the configuration.
        of_the_last: More of them, of the last host alone.
        before_the_last: What starts the torchrun of the last host.
        script: What is trained with, and arguments of it that come first.
    """
    launched = []
    for number, name in enumerate(names):
        command = [
            *(before_the_last if name == names[-1] else ()),
            "torchrun",
            "--nnodes",
            str(len(names)),
            "--nproc_per_node",
            str(ranks_per_host),
        ]
        command += ["--node_rank", str(number), "--master_addr", names[0], "--master_port", "29500"]
        command += [*script, "--config", str(config), *overrides, *(of_the_last if name == names[-1] else ())]
        launched.append(Launched(hosts, name, command, config.parent))
    return launched


def mpirun(hosts: Hosts, slots: Mapping[str, int], config: Path, *overrides: str) -> Launched:
    """Start mpirun on the first of the hosts, which reaches the others by ssh."""
    first = next(iter(slots))
    # It gives the ranks a terminal, which rich would draw bars on: lines are what tests read.
    own = {"MASTER_ADDR": first, "TTY_COMPATIBLE": "0"}
    command = ["mpirun", "--host", ",".join(f"{host}:{count}" for host, count in slots.items())]
    command += [word for name in (*FORWARDED, *own, "PATH", "PYTHONPATH") for word in ("-x", name)]
    command += ["python", str(SCRIPT), "--config", str(config), *overrides]
    return Launched(hosts, first, command, config.parent, own)


def find_ranks(hosts: Hosts, host: str, script: Path = SCRIPT) -> dict[int, int]:
    """Return the process of each rank on a host, by the machine's number, as its environment says."""
    found = {}
    for pid in hosts.find_processes(host, f"{script} "):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        ranks = [int(line.partition(b"=")[2]) for line in variables if line.startswith(_RANK)]
        if ranks:
            found[ranks[0]] = pid
    return found

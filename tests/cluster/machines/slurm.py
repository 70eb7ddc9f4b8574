"""A real SLURM on hosts of ``network.py``: slurmctld and munged on one of them, a slurmd on each of the others."""

from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.machines.network import POLL_SECONDS, START_SECONDS, Hosts

DEAD_NODE_SECONDS = 10
"""How long SLURM hears nothing of a node before it gives the node up."""
GRACE_SECONDS = 15
"""How long a job has between SIGTERM and SIGKILL when it is preempted."""
REQUEUE_SECONDS = 5
"""How long a requeued job waits, until no credential of its former life is valid; SLURM's default is 120."""
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={dead_node_seconds}
KillWait=5
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_seconds}
PartitionName=spot Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime={grace_seconds} PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
GPUS = 8
"""Of each node."""
_NODE = f"NodeName={{name}} NodeAddr={{address}} CPUs=8 RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"


class Slurm:
    """A SLURM until the context ends. Partitions: batch, spot, and urgent, whose jobs preempt those of the others.

    A job of batch that is preempted goes back into the queue, and one of spot is cancelled.

    Args:
        hosts: They are on.
        controller: The host of slurmctld, on which the commands of SLURM run.
        nodes: The hosts on which jobs run.
        folder: For its files; every host sees it.
    """

    def __init__(self, hosts: Hosts, controller: str, nodes: Sequence[str], folder: Path) -> None:
        self.hosts, self.controller, self.nodes, self.folder = hosts, controller, list(nodes), folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        (self.folder / "state").mkdir(parents=True)
        nodes = "\n".join(_NODE.format(name=name, address=self.hosts.addresses[name]) for name in self.nodes)
        words = {"controller": self.controller, "address": self.hosts.addresses[self.controller], "nodes": nodes}
        words |= {"folder": self.folder, "dead_node_seconds": DEAD_NODE_SECONDS, "grace_seconds": GRACE_SECONDS}
        words["requeue_seconds"] = REQUEUE_SECONDS
        (self.folder / "slurm.conf").write_text(_SLURM_CONF.format(**words))
        for number in range(GPUS):  # pretended: each is a /dev/null
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused, but finding one out can fail
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        # By force: other users cannot enter pytest's folders, which munged would refuse.
        self._start_daemon(self.controller, ["munged", "--foreground", "--force", *options])
        self.wait_until((self.folder / "munge.socket").exists)
        self._start_daemon(self.controller, ["slurmctld", "-D"])
        for name in self.nodes:
            self.start_node(name)
        self.wait_until(lambda: self.count_idle() == len(self.nodes))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (self.controller, *self.nodes):
            self.hosts.kill_all(name)

    def restore(self) -> None:
        """End every job, and wait until each node is idle; one that is off is started."""
        self.run("scancel", "--user=root", check=False)
        for name in self.nodes:
            if not self.hosts.is_on(name):
                self.hosts.power_on(name)
                self.start_node(name)
        self.wait_until(lambda: self.count_idle() == len(self.nodes), timeout=60.0)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._start_daemon(name, ["slurmd", "-D", "-N", name])

    def count_idle(self) -> int:
        """Return the number of nodes on which a job could start."""
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split().count("idle")

    def run(self, *command: str, folder: Path | None = None, check: bool = True, timeout: float = 60.0) -> str:
        """Return what a command prints on the controller's host, both streams; an error if it fails and ``check``."""
        return self.hosts.run(
            self.controller, *command, folder=folder, environment=self.environment, check=check, timeout=timeout
        )

    def submit(self, script: Path, *options: str) -> str:
        """Submit a job from the script's folder; return its number."""
        said = self.run("sbatch", "--parsable", *options, script.name, folder=script.parent)
        return said.split()[-1]

    def show(self, job: str) -> dict[str, str]:
        """Return what SLURM says of a job, among them JobState, Restarts and ExitCode."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for(self, job: str, states: Sequence[str], timeout: float) -> dict[str, str]:
        """Return what SLURM says of a job as soon as it is in one of these states."""
        deadline = time.monotonic() + timeout
        while (shown := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, shown
            time.sleep(4 * POLL_SECONDS)
        return shown

    def end_soon(self, job: str, seconds: int) -> None:
        """Set a job's time limit, in whole minutes, to so many seconds from now or up to a minute more."""
        hours, minutes, elapsed = (int(part) for part in self.show(job)["RunTime"].split(":"))
        limit = -(-(3600 * hours + 60 * minutes + elapsed + seconds) // 60)
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def wait_for_restart(self, job: str, timeout: float, count: int = 1) -> None:
        """Wait until a job has been put back into the queue so many times."""
        self.wait_until(lambda: int(self.show(job)["Restarts"]) >= count, timeout, lambda: str(self.show(job)))

    def wait_until(
        self, condition: Callable[[], bool], timeout: float = START_SECONDS, describe: Callable[[], str] | None = None
    ) -> None:
        """Wait until something holds; ``describe`` says what is there in its place."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(describe() if describe else self.run("sinfo", "-N", "-l", check=False))
            time.sleep(2 * POLL_SECONDS)

    def _start_daemon(self, host: str, command: list[str]) -> subprocess.Popen[bytes]:
        output = self.folder / f"{command[0]}.{host}.out"
        return self.hosts.start(host, command, folder=self.folder, output=output, environment=self.environment)

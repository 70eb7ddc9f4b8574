"""Whether this machine can be several hosts, and the Debian packages that make it so.

As a script it installs what is missing, where it may, and prints what stands in the way, if anything does.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "mpirun": "openmpi-bin",
    "cc": "gcc",
}
"""What the tests run, and the package that brings it."""
NAMESPACES = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
"""What makes a process a host of its own: its mounts, its name, its shared memory, its network, its processes."""
_INSTALL_SECONDS = 300
_INSTALL_LOCK = Path("/run/megalibi-tests-install.lock")
_FORBIDS = 101
"""What policy-rc.d exits with where installed services must not be started."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@functools.cache
def find_obstacle() -> str | None:
    """Install the packages that are missing, where that is allowed; return why there can be no hosts, None if they can.

    Packages are installed by root alone, and only where apt-get would not start the services that it installs: in a
    container, whose /usr/sbin/policy-rc.d forbids it.
    """
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run([*NAMESPACES, "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"this root may not make namespaces: {' '.join(probe.stderr.split())}"
    missing = _find_missing()
    if not missing:
        return None
    advice = f"install {' '.join(missing)} (Debian's names)"
    if shutil.which("apt-get") is None:
        return f"there is no apt-get: {advice}"
    if not _services_stay_off():
        return f"apt-get would start the services that it installs: {advice} yourself"
    with _INSTALL_LOCK.open("w") as lock:  # another session of tests may install them just now
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = _find_missing()
        problem = _install(missing) if missing else None
    return problem or (f"after apt-get some programs are missing: {advice}" if _find_missing() else None)


def _find_missing() -> list[str]:
    """Return the packages whose programs are not here."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=SYSTEM_PATH) is None})


def _services_stay_off() -> bool:
    policy = Path("/usr/sbin/policy-rc.d")
    return policy.exists() and subprocess.run([policy, "ssh", "start"], capture_output=True).returncode == _FORBIDS


def _install(packages: list[str]) -> str | None:
    """Install packages; return why they could not be, None if they could."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": SYSTEM_PATH}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    for command in (["apt-get", "update"], install):
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_INSTALL_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"'{' '.join(command)}' did not end within {_INSTALL_SECONDS} s"
        if done.returncode != 0:
            words = done.stderr.strip().splitlines() or [""]
            return f"'{' '.join(command)}' failed with {done.returncode}: {words[-1]}"
    return None


if __name__ == "__main__":
    sys.stdout.write(find_obstacle() or "")

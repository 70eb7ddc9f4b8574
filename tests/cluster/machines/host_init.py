"""The first process of a host that tests make: gives it its name, its own files in /etc and its sshd, which it becomes.

It is started in namespaces of its own, with the host's name and the folder of these files as arguments; see
``network.py``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Become the host that the arguments name."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    socket.sethostname(name)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/shm"], check=True)
    for source in ("hosts", "passwd", "resolv.conf", "ssh/ssh_config"):
        subprocess.run(["mount", "--bind", folder / Path(source).name, f"/etc/{source}"], check=True)
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")])


if __name__ == "__main__":
    main()

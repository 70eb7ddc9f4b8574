"""Several hosts on one machine: each has its own network, name, processes, shared memory and sshd.

A host is a process in namespaces of its own; the cables go to a switch, which is one more. Nothing of the machine's own
network or files is changed, and all of it ends with the process that made it, however that ends.
The file system is shared, as over NFS, and beside it a small disk that can be filled. What is not real: speed, separate
file systems, GPUs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.cluster.machines.debian import NAMESPACES, SYSTEM_PATH
from tests.cluster.machines.host_files import write_ssh_and_users

START_SECONDS = 20.0
POLL_SECONDS = 0.05
NETWORK = "10.77.0"
"""The first three numbers of the addresses; nobody outside the switch sees them."""
SILENT_NAME_SERVER = f"{NETWORK}.200"
"""An address at which nobody answers."""
SMALL_DISK_BYTES = 16 << 20
_NOBODY = "02:00:00:00:00:ff"
_DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]


class Hosts:
    """Hosts that are on until the context ends.

    Args:
        names: Of the hosts.
        folder: For their files; every host sees it.
    """

    def __init__(self, names: Iterable[str], folder: Path) -> None:
        self.folder = folder
        self.small_disk = folder / "small_disk"
        """Where every host has the same disk of SMALL_DISK_BYTES; see ``look_at``."""
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}
        """Of each host's first process, as the machine counts."""

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants
        for key in ("user_key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        try:
            self._start_switch()
            for name in self.addresses:
                self._start(name)
            for name in self.addresses:
                self.wait_for_ssh(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of every host; their networks go with them."""
        for name in [*self._processes]:
            self._end(name)

    def look_at(self, path: Path) -> Path:
        """Return where this machine sees a path of the hosts, whose small disk it does not have itself."""
        return Path(f"/proc/{self._pids['switch']}/root{path}")

    # What runs on them

    def start(
        self,
        host: str,
        command: Sequence[str],
        *,
        folder: Path,
        output: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host.

        Args:
            host: Its name.
            command: The program and its arguments.
            folder: In which it runs.
            output: The file for what it prints, both streams.
            environment: Its variables; None: those of this process.
        """
        with output.open("ab") as file:
            return subprocess.Popen(
                self._enter(host, command, folder), env=_with_system_path(environment), stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(
        self,
        host: str,
        *command: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> str:
        """Return what a command prints on a host, both streams; an error if it fails and ``check``."""
        done = subprocess.run(
            self._enter(host, command, folder or self.folder), env=_with_system_path(environment),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command} on {host}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def find_processes(self, host: str, words: str) -> list[int]:
        """Return the processes of a host whose command line has these words, by the machine's numbers for them."""
        namespace = os.readlink(f"/proc/{self._pids[host]}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if os.readlink(entry / "ns/pid") == namespace:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line and words in line:  # a zombie has none
                        found.append(int(entry.name))
        return sorted(found)

    def kill_all(self, host: str) -> None:
        """Kill every process of a host but its sshd, and wait for their ends."""
        first = self._pids[host]
        for pid in self.find_processes(host, ""):
            if pid != first:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._wait(lambda: self.find_processes(host, "") == [first])

    # What happens to them

    def cut(self, host: str) -> None:
        """Pull a host's cable."""
        self._switch("link", "set", self._port(host), "down")

    def join(self, host: str) -> None:
        """Plug a host's cable in."""
        self._switch("link", "set", self._port(host), "up")

    def power_off(self, host: str) -> None:
        """End a host as a power failure does: no connection is closed, no process has a last word."""
        self.cut(host)
        self._end(host)
        self._switch("link", "delete", self._port(host))

    def is_on(self, host: str) -> bool:
        return host in self._processes

    def power_on(self, host: str) -> None:
        """Start a host that is off."""
        self._start(host)
        self.wait_for_ssh(host)

    def map_own_name(self, host: str, address: str | None) -> None:
        """Let a host map its own name to an address, as Debian's installer does with 127.0.1.1; None: to its own."""
        lines = ["127.0.0.1 localhost"]
        lines += [f"{address}\t{host}"] if address else []
        lines += [f"{own}\t{name}" for name, own in self.addresses.items() if not (address and name == host)]
        self._etc(host, "hosts").write_text("\n".join(lines) + "\n")

    def set_name_server(self, host: str, address: str | None) -> None:
        """Tell a host whom to ask for names that are not in its /etc/hosts; None: nobody."""
        # A look-up at an address where nothing listens is refused at once; without any line glibc asks there too.
        self._etc(host, "resolv.conf").write_text(f"nameserver {address or '127.0.0.1'}\n")

    def restore(self) -> None:
        """Make every host as it was at the start: on, plugged in, with nothing but its sshd, the small disk empty."""
        for host in self.addresses:
            if self.is_on(host):
                self.kill_all(host)
                self.join(host)
                self.map_own_name(host, None)
                self.set_name_server(host, None)
            else:
                self.power_on(host)
        for path in self.look_at(self.small_disk).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # How they are made

    def wait_for_ssh(self, host: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "yes" not in self.run(host, "ssh", host, "echo", "yes", check=False):
            assert time.monotonic() < deadline, (self.folder / f"{host}.log").read_text()
            time.sleep(POLL_SECONDS)

    def _enter(self, host: str, command: Sequence[str], folder: Path) -> list[str]:
        enter = ["nsenter", "--target", str(self._pids[host]), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*enter, f"--wdns={folder}", "--", *_DIE_WITH_PARENT, *command]

    def _start_switch(self) -> None:
        """Start what has the network between the hosts, and the mounts that they begin with."""
        self.small_disk.mkdir(exist_ok=True)
        mount = f'mount -t tmpfs -o size={SMALL_DISK_BYTES} none "$0" && exec sleep infinity'
        command = [*_DIE_WITH_PARENT, "unshare", "--net", "--mount", "sh", "-c", mount, str(self.small_disk)]
        self._processes["switch"] = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._pids["switch"] = self._processes["switch"].pid
        self._wait(self.look_at(self.small_disk).is_mount)
        self._switch("link", "add", "bridge", "type", "bridge")
        self._switch("link", "set", "bridge", "up")

    def _start(self, host: str) -> None:
        etc = self._etc(host, "")
        etc.mkdir(exist_ok=True)
        write_ssh_and_users(etc, self.folder)
        self.map_own_name(host, None)
        self.set_name_server(host, None)
        mounts = ["nsenter", "--target", str(self._pids["switch"]), "--mount", "--"]
        init = [sys.executable, "-S", str(Path(__file__).with_name("host_init.py")), host, str(etc)]
        with (self.folder / f"{host}.log").open("ab") as log:
            self._processes[host] = subprocess.Popen(
                [*_DIE_WITH_PARENT, *mounts, *NAMESPACES, "--kill-child", *init],
                env={"PATH": SYSTEM_PATH}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        outer = self._processes[host].pid
        children = Path(f"/proc/{outer}/task/{outer}/children")
        self._wait(lambda: children.read_text() != "")
        self._pids[host] = int(children.read_text())
        self._plug(host)

    def _end(self, name: str) -> None:
        """Kill a host's first process, and so all of them."""
        process = self._processes.pop(name)
        with suppress(ProcessLookupError):
            os.kill(self._pids.pop(name, process.pid), signal.SIGKILL)
        process.wait()  # it waits for the first process, which it started

    def _plug(self, host: str) -> None:
        port, pid = self._port(host), self._pids[host]
        # The address of the network card is the host's own, whatever number of times it is started.
        card = f"02:00:00:00:00:{list(self.addresses).index(host) + 1:02x}"
        peer = f"peer name eth0 address {card} netns {pid}"
        self._switch("link", "add", port, "type", "veth", *peer.split())
        self._switch("link", "set", port, "master", "bridge", "up")
        inside = ["nsenter", "--target", str(pid), "--net", "ip"]
        for words in (f"addr add {self.addresses[host]}/24 dev eth0", "link set lo up", "link set eth0 up"):
            subprocess.run([*inside, *words.split()], check=True)
        # A network card that nobody has: what is sent there is lost, and no router says so.
        subprocess.run([*inside, *f"neigh add {SILENT_NAME_SERVER} lladdr {_NOBODY} dev eth0".split()], check=True)

    def _switch(self, *words: str) -> None:
        subprocess.run(["nsenter", "--target", str(self._pids["switch"]), "--net", "ip", *words], check=True)

    def _port(self, host: str) -> str:
        return f"port{list(self.addresses).index(host) + 1}"

    def _etc(self, host: str, name: str) -> Path:
        return self.folder / f"etc.{host}" / name

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)


def _with_system_path(environment: Mapping[str, str] | None) -> dict[str, str]:
    """Return the variables, with the folders of Debian's daemons in the PATH."""
    variables = dict(os.environ if environment is None else environment)
    variables["PATH"] = f"{variables.get('PATH', '')}:{SYSTEM_PATH}"
    return variables

"""A Python for studies under test that starts in a moment: its processes are forked from a server that has imported
torch and DeepSpeed already.

``PYTHON SCRIPT ARGUMENTS`` and ``PYTHON -m MODULE ARGUMENTS`` are what they always are: a process of its own with its
own arguments, environment, output and exit code, and the script or module is run as ``__main__``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PRELOADED = (
    "megalibi.train.loop",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
START_SECONDS = 120.0
SERVE = "--serve"


def ask(address: str, command: list[str]) -> int:
    """Ask the server for a process that does a command; return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = json.dumps({"command": command, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [1, 2])
        connection.sendall(request)
        return int.from_bytes(connection.recv(1) or b"\1", "big")


def serve(address: str) -> None:
    """Fork a process for each request, one after the other, until standard input ends."""
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                size, files, *_ = socket.recv_fds(connection, 8, 2)
                request = json.loads(_receive(connection, int.from_bytes(size, "big")))
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    _become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255]))


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += connection.recv(size - len(parts))
    return bytes(parts)


def _become(request: dict, files: list[int]) -> None:
    import runpy

    for place, file in enumerate(files, start=1):
        os.dup2(file, place)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["command"][0] == "-m":
        sys.argv, sys.path[0] = request["command"][1:], request["folder"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        os._exit(0)
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")  # its end is os._exit
    os._exit(0)


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Start a server; give an executable that stands for Python, and stop the server in the end."""
    address = str(folder / "socket")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen([sys.executable, __file__, SERVE, address], env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(address):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {address} "$@"\n')
        python.chmod(0o755)
        yield python
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1] == SERVE:
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))

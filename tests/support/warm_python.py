"""A Python that starts in a moment: its processes are forked from a server that has imported torch and DeepSpeed.

``PYTHON SCRIPT ARGUMENTS`` and ``PYTHON -m MODULE ARGUMENTS`` are what they always are: a process of its own with its
own arguments, environment, input, output and exit code, and the script or module is run as ``__main__``. It is the
child of another process than of the one that asked, to which signals are passed on; it is killed when that one dies.
Its ``sys.executable`` is this Python again. What torch and DeepSpeed read from the environment when they are imported
was read by the server: tests of that need a new Python, and ``PYTHON -c`` is one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

START_SECONDS = 120.0
SERVE = "--serve"
PRELOADED = ("tests.support.preloaded", "megalibi.report.plots")
"""Tools draw."""
DIED = b"\1"
GO = b"\2"
"""Says that whoever asked for a process passes signals on to it by now: it may begin."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@functools.cache
def warm_python() -> str:
    """Return an executable that stands for Python; the first call starts its server, which ends with the test session.

    Never call it where a module is imported: to collect the tests would start it.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm_python_"))
    address, python = str(folder / "socket"), folder / "python"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen([sys.executable, __file__, SERVE, address], env=environment)
    atexit.register(_stop, server, folder)
    deadline = time.monotonic() + START_SECONDS
    while not os.path.exists(address):
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {address} "$0" "$@"\n')
    python.chmod(0o755)
    return str(python)


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


def ask(address: str, python: str, command: list[str]) -> int:
    """Ask the server for a process that does a command; return its exit code."""
    if command[0].startswith("-") and command[0] != "-m":
        os.execv(sys.executable, [sys.executable, *command])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        fields = {"python": python, "command": command, "environment": dict(os.environ), "folder": os.getcwd()}
        request = json.dumps(fields).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        process = int.from_bytes(_receive(connection, 8), "big")
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(process, number))
        connection.sendall(GO)
        return int.from_bytes(connection.recv(1) or DIED, "big")


def serve(address: str) -> None:
    """Fork a process for each request, until it is killed."""
    sys.path.insert(1, str(Path(__file__).parents[2]))
    for module in PRELOADED:
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the processes that attend to a request
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _attend(connection)
            connection.close()


def _attend(connection: socket.socket) -> NoReturn:
    """Start what is asked for, and answer with its exit code, or kill it when whoever asked has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    request = json.loads(_receive(connection, int.from_bytes(size, "big")))
    waits, begins = os.pipe()
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.close(begins)
        os.read(waits, 1)
        os.close(waits)
        _become(request, files)
    with contextlib.suppress(OSError):
        connection.sendall(pid.to_bytes(8, "big"))
        if connection.recv(1) == GO:
            os.write(begins, GO)
    for file in (0, 1, 2, *files):
        os.close(file)
    ended = os.pidfd_open(pid)
    readable, _, _ = select.select([ended, connection], [], [])
    if ended not in readable:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code & 255]))
    os._exit(0)


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _become(request: dict, files: list[int]) -> NoReturn:
    import runpy
    import threading
    import traceback

    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    # The server's streams remember what its own files were: a file can be sought in, and a pipe cannot.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.executable = request["python"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    code: object = 0
    try:
        if request["command"][0] == "-m":
            sys.argv, sys.path[0] = request["command"][1:], request["folder"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["command"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    if sys.argv[1] == SERVE:
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2], sys.argv[3:]))

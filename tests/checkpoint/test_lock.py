from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalibi.checkpoint.lock import LOCK_FILE, RunLock
from megalibi.errors import ConfigError
from tests.power_failure.c_library import build_library

HOLD = """
import sys, time
from pathlib import Path
from megalibi.checkpoint.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a process that holds the folder."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    assert process.stdout is not None
    assert any(line == "held\n" for line in iter(process.stdout.readline, ""))  # DeepSpeed prints before it
    return process


def test_a_second_run_is_refused_by_name_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    try:
        with pytest.raises(ConfigError) as refused, RunLock(tmp_path / "run"):
            pass
        message = f"train.output_dir={tmp_path}/run is in use by another run (host {socket.gethostname()}, pid "
        assert str(refused.value).startswith(f"{message}{holder.pid}, since 20")
    finally:
        holder.kill()
        holder.wait()
    began = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 1.0
    with RunLock(tmp_path / "run"):  # and again, by the same process
        pass


def test_a_folder_that_was_never_used_goes_again_and_one_that_was_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "config.yaml").write_text("x")
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["config.yaml", LOCK_FILE]
    with RunLock(tmp_path):
        pass
    assert LOCK_FILE in [path.name for path in tmp_path.iterdir()]


def other_host(tmp_path: Path, sign: int = 0) -> None:
    owner = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 10:00:00", "sign": sign}
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))


def test_where_locks_do_not_reach_another_host_its_sign_of_life_refuses(tmp_path: Path) -> None:
    """The file is what a run on a host leaves whose locks this host does not see."""
    other_host(tmp_path)
    code = (
        "import json, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "fields = json.loads(path.read_text())\n"
        "time.sleep(0.5)\n"
        "path.write_text(json.dumps({**fields, 'sign': 1}))\n"
    )
    living = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK_FILE)])
    with (
        pytest.raises(ConfigError, match=r"in use by another run \(host elsewhere, pid 7, since 2026-01-01 10:00:00\)"),
        RunLock(tmp_path, watch_seconds=30.0),
    ):
        pass
    assert living.wait() == 0


def test_a_run_that_died_on_another_host_is_taken_over_after_a_while(tmp_path: Path) -> None:
    other_host(tmp_path)
    began = time.monotonic()
    with RunLock(tmp_path, watch_seconds=1.0):
        assert time.monotonic() - began >= 1.0
        assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == socket.gethostname()


def test_a_lock_whose_host_gives_no_sign_is_waited_for(tmp_path: Path) -> None:
    """A file server holds the lock of a host that crashed until its lease ends: here a process does."""
    holder = hold(tmp_path)
    try:
        other_host(tmp_path)  # the holder's next sign is 10 seconds away
        began = time.monotonic()
        with (
            pytest.raises(ConfigError, match=r"in use by another run \(host elsewhere, pid 7"),
            RunLock(tmp_path, watch_seconds=0.5, lease_seconds=1.0),
        ):
            pass
        assert time.monotonic() - began >= 1.0
        threading.Timer(1.0, holder.kill).start()
        with RunLock(tmp_path, watch_seconds=0.5, lease_seconds=60.0):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == socket.gethostname()
    finally:
        holder.kill()
        holder.wait()


def test_a_run_gives_signs_of_life(tmp_path: Path) -> None:
    with RunLock(tmp_path, sign_seconds=0.05):
        deadline = time.monotonic() + 10.0
        while int(json.loads((tmp_path / LOCK_FILE).read_text())["sign"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (tmp_path / LOCK_FILE).read_bytes() == b""


NO_LOCKS = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }
"""


def test_where_there_are_no_locks_a_living_process_of_this_host_refuses(tmp_path: Path) -> None:
    """As on a disk that was mounted without them: the call itself fails, in real processes."""
    build_library(tmp_path / "no_locks.so", NO_LOCKS)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "no_locks.so")}
    holder = hold(tmp_path / "run", environment)
    try:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
        second = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
        )
        assert second.returncode == 1
        assert f"is in use by another run (host {socket.gethostname()}, pid {holder.pid}, since" in second.stderr
    finally:
        holder.kill()
        holder.wait()
    holder = hold(tmp_path / "run", environment)
    holder.kill()
    holder.wait()

"""One run to a folder: a second one would write over the checkpoints and the metrics of the first.

The file ``run.lock`` is locked while a run writes into the folder, and says which host and process that is. The lock
ends with its process, so that a crash leaves none. NFS and most other shared file systems pass locks on to other hosts;
after the crash of a host some hold its lock for a minute or two. Where there are no locks, or they do not reach other
hosts, the file's signs of life decide: a run rewrites it every few seconds, and another run watches it for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from megalibi.errors import ConfigError, FileError
from megalibi.files import FileInUseError, lock_file, make_folder
from megalibi.log import get_logger

LOCK_FILE = "run.lock"
SIGN_SECONDS = 10.0
"""The time from one sign of life to the next."""
WATCH_SECONDS = 25.0
"""How long to wait for signs of another host's run: time for two of them to be given and to be seen here."""
LEASE_SECONDS = 120.0
"""How long to wait for a lock whose host gives no sign of life: NFS keeps a crashed host's lock for 90 seconds."""
_LOGGER = get_logger(__name__)


class RunLock:
    """Holds a run's folder from ``__enter__`` to ``__exit__``.

    Args:
        folder: train.output_dir; it is made if it does not exist.
        sign_seconds: How often to give a sign of life.
        watch_seconds: How long to wait for the signs of another host's run.
        lease_seconds: How long to wait for a lock whose host gives no sign of life.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sign_seconds: float = SIGN_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._folder = folder
        self._path = folder / LOCK_FILE
        self._sign_seconds, self._watch_seconds, self._lease_seconds = sign_seconds, watch_seconds, lease_seconds
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%F %T"),
            "id": uuid.uuid4().hex,  # hosts may share a name
        }
        self._made: list[Path] = []
        self._descriptor = -1
        self._ended = threading.Event()
        self._signs = threading.Thread(target=self._give_signs, daemon=True)

    def __enter__(self) -> RunLock:
        """Take the folder for this run.

        Raises:
            ConfigError: Another run has it.
            FileError: The folder cannot be written.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            make_folder(self._folder)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FileError(f"train.output_dir={self._folder} cannot be used: {error.strerror}") from error
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._signs.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the folder back: an empty file says that nobody has it. A new folder that was not used is removed."""
        self._ended.set()
        self._signs.join()  # or its last sign would follow the end
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            if self._made and os.listdir(self._folder) == [LOCK_FILE]:
                self._path.unlink()
                for path in self._made:
                    path.rmdir()
        os.close(self._descriptor)

    def _take(self) -> None:
        is_locked = self._lock()
        left = self._read()
        if left is not None:
            if left.get("host") != self._owner["host"]:
                self._watch(left, self._watch_seconds)
            elif not is_locked and _is_alive(left.get("pid")):
                raise self._refusal(left)
        self._give_sign(0)
        if not is_locked:  # another run may have begun at the same moment: the last to write has it
            time.sleep(min(2.0, self._watch_seconds / 5))
            now = self._read()
            if now is not None and now.get("id") != self._owner["id"]:
                raise self._refusal(now)

    def _lock(self) -> bool:
        """Lock the file, and return whether this file system has locks."""
        deadline = time.monotonic() + self._lease_seconds
        while True:
            try:
                return lock_file(self._descriptor, self._path)
            except FileInUseError:
                owner = self._read() or {}
                if owner.get("host") in (None, self._owner["host"]) or time.monotonic() > deadline:
                    raise self._refusal(owner) from None
                _LOGGER.info("run.lock is held by host %s: waiting for a sign of life, or its end", owner["host"])
                self._watch(owner, self._watch_seconds)

    def _read(self) -> dict[str, Any] | None:
        """Return the fields in the file, or no fields if it cannot be read yet; None: nobody has the folder."""
        try:
            text = self._path.read_bytes()
        except OSError:
            return {}
        if not text:
            return None
        try:
            fields = json.loads(text)
        except ValueError:  # being written
            return {}
        return fields if isinstance(fields, dict) else {}

    def _watch(self, left: dict[str, Any], seconds: float) -> None:
        """Wait for a sign of life of another run, and refuse if there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 5))
            now = self._read()
            if now is None:  # given back
                return
            if now and now != left:
                raise self._refusal(now)

    def _refusal(self, owner: dict[str, Any]) -> ConfigError:
        who = f"host {owner.get('host', '?')}, pid {owner.get('pid', '?')}, since {owner.get('since', '?')}"
        return ConfigError(
            f"train.output_dir={self._folder} is in use by another run ({who}): wait for its end, stop it, or choose "
            "another train.output_dir"
        )

    def _give_signs(self) -> None:
        number = 0
        while not self._ended.wait(self._sign_seconds):
            number += 1
            with contextlib.suppress(OSError):  # a full disk; the lock itself stands
                self._give_sign(number)

    def _give_sign(self, number: int) -> None:
        """Write who has the folder, in one write of a fixed length: no reader then finds parts of two signs."""
        text = json.dumps({**self._owner, "sign": f"{number:012d}"}).encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)  # or another host may not see it in time


def _is_alive(pid: Any) -> bool:
    """Return whether a process of this host runs."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()

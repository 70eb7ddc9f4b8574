"""One run to a folder: a second one would write over the checkpoints and the metrics of the first.

The file ``run.lock`` is locked while a run writes into the folder, and says which host and process that is. The lock
ends with its process, so that a crash leaves none. NFS and most other shared file systems pass locks on to other hosts.
Where they do not, the sign of life that the file shows is watched for a while before a run takes over from another
host.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megalibi.config import ConfigError
from megalibi.files import FileInUseError, lock_file, make_folder

LOCK_FILE = "run.lock"
SIGN_SECONDS = 10.0
"""How often a run gives a sign of life."""
WATCH_SECONDS = 25.0
"""How long a run that another host left is watched: two signs and some time for the file system to show them."""


class RunLock:
    """Holds a run's folder from ``__enter__`` to ``__exit__``.

    Args:
        folder: train.output_dir; it is made if it does not exist.
        sign_seconds: How often to give a sign of life.
        watch_seconds: How long to wait for that of another host's run.
    """

    def __init__(
        self, folder: Path, *, sign_seconds: float = SIGN_SECONDS, watch_seconds: float = WATCH_SECONDS
    ) -> None:
        self._folder = folder
        self._path = folder / LOCK_FILE
        self._sign_seconds = sign_seconds
        self._watch_seconds = watch_seconds
        self._ended = threading.Event()
        self._made: list[Path] = []
        self._owner: dict[str, Any] = {}
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        """Take the folder.

        Raises:
            ConfigError: Another run has it, or the folder cannot be written.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            make_folder(self._folder)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            lock_file(self._descriptor, self._path)
        except FileInUseError:
            raise self._refusal(self._read()) from None
        except OSError as error:
            raise ConfigError(f"train.output_dir={self._folder} cannot be used: {error.strerror}") from error
        left = self._read()
        if left and left.get("host") != socket.gethostname():
            self._watch(left)
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        self._give_sign(0)
        self._signs = threading.Thread(target=self._give_signs, daemon=True)
        self._signs.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the folder back: an empty file says that nobody has it. Folders that were never used go again."""
        self._ended.set()
        self._signs.join()  # or its last sign would follow the end
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            if self._made and os.listdir(self._folder) == [LOCK_FILE]:
                self._path.unlink()
                for path in self._made:
                    path.rmdir()
        os.close(self._descriptor)

    def _read(self) -> dict[str, Any]:
        """Return what the file says; empty if it says nothing, or is being written."""
        try:
            fields = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def _watch(self, left: dict[str, Any]) -> None:
        deadline = time.monotonic() + self._watch_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._watch_seconds / 5))
            now = self._read()
            if not now:
                return
            if now != left:
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
        text = json.dumps({**self._owner, "sign": number}).encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))

"""The watchdog: a thread that ends this rank when it has made no progress for a given time, and says why.

It calls no collective and needs nothing of the main thread. Where it cannot run itself, because some code keeps
Python's lock or a disk does not answer, faulthandler's thread writes the stacks to standard error and ends the process,
and where not even that can write, the system's alarm does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil

from megalibi.files import make_folder
from megalibi.log import get_logger
from megalibi.parallel import Group
from megalibi.runtime.exit import EXIT_FAILED
from megalibi.runtime.hang.signs import RankSign, RankSigns
from megalibi.runtime.hang.verdict import name_culprits
from megalibi.runtime.hang.whereabouts import find_whereabouts

STACKS_FOLDER = "hang"
"""Folder of a run's folder with the stacks of each rank that made no progress."""
FIRST_STEP_SECONDS = 600.0
"""The shortest time that a rank has until its first step is done, in which models are built and kernels compiled."""
PROGRESS_BYTES = 2**24
"""A rank that has read or written so much since its last progress makes progress: it saves or loads a checkpoint."""
_TICK_SECONDS = 2.0
"""The longest time between two looks at this rank."""
_END_SECONDS = 20
"""How long it may take to say what is wrong and to end."""
_GRACE_SECONDS = 1.0
"""How long this rank waits beyond the ticks by which the ranks differ, so that each says its own before one ends."""
_STDERR = 2
_LOGGER = get_logger(__name__)


class Watchdog:
    """Watches this rank from ``__enter__`` to ``__exit__``.

    Args:
        limit_seconds: The time without progress after which the process ends; 0: nothing is watched.
        run_dir: The run's folder, which all hosts see.
        world: All ranks.
        hosts: The host of each rank.
    """

    def __init__(self, limit_seconds: float, run_dir: Path, world: Group, hosts: Sequence[str]) -> None:
        self._limit_seconds, self._world, self._hosts = limit_seconds, world, hosts
        self._tick = min(_TICK_SECONDS, limit_seconds / 8)
        self._stacks_path = run_dir / STACKS_FOLDER / f"rank_{world.rank:05d}.txt"
        self._signs = RankSigns(run_dir, world.rank, world.size)
        self._process = psutil.Process()
        self._marks = self._step = self._signs_given = self._progress = 0
        self._seen: tuple[int, int] = (0, 0)
        """The marks and the bytes read and written when progress was last seen."""
        self._has_stepped = self._is_suspicious = False
        self._progress_seconds = self._sign_seconds = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="megalibi-watchdog")

    def mark(self, step: int | None = None) -> None:
        """Note that this rank has come to the next place of the training loop; every rank passes the same ones.

        Args:
            step: The number of optimizer steps done, where a step ends; None elsewhere.
        """
        self._marks += 1
        if step is not None:
            self._step, self._has_stepped = step, True

    def __enter__(self) -> Watchdog:
        if self._limit_seconds > 0:
            self._arm(self._limit)
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._limit_seconds > 0:
            self._ended.set()
            self._thread.join(_END_SECONDS)
            faulthandler.cancel_dump_traceback_later()
            signal.alarm(0)  # the process may go on with something else
            if self._has_stepped or error_type is None:
                self._signs.remove()
            else:  # the run may have been refused, and then its folder goes, if nothing is in it
                self._signs.clear()
            if self._is_suspicious and error_type is None:
                self._take_suspicion_back()

    @property
    def _limit(self) -> float:
        return self._limit_seconds if self._has_stepped else max(self._limit_seconds, FIRST_STEP_SECONDS)

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            try:
                self._look(time.monotonic())
            except Exception:  # a fault in here must not end a run that is well, nor keep one that hangs
                _LOGGER.exception("the watchdog met an error that nobody foresaw")
                if time.monotonic() - self._progress_seconds > self._limit:
                    os._exit(EXIT_FAILED)
            self._arm(self._limit)
            is_over = self._ended.wait(self._tick)

    def _arm(self, seconds: float) -> None:
        """End this process by other means if this thread does not come here again in time.

        A little later than the other ranks, which lose it then, have found out that it gives no sign of life.
        """
        seconds += 3 * self._tick + _GRACE_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
        signal.alarm(math.ceil(seconds) + _END_SECONDS)

    def _look(self, now: float) -> None:
        if self._has_progressed():
            self._progress_seconds = now
            if self._is_suspicious:
                self._take_suspicion_back()
        idle = now - self._progress_seconds
        if idle >= self._limit / 2 and not self._is_suspicious:
            self._is_suspicious = True
            self._write_stacks(idle)  # now, for a launcher may kill this rank when the first one has ended
        if now - self._sign_seconds >= self._limit_seconds / 8:
            self._sign_seconds = now
            if self._world.size > 1:
                self._signs.give(self._describe())
                if self._is_suspicious:
                    self._signs.look(now)
        if idle >= self._limit and not self._others_progress(now):
            self._end(idle)

    def _has_progressed(self) -> bool:
        """Return whether there was progress since this was last so, and count it."""
        seen = self._marks, self._count_bytes()
        if seen[0] == self._seen[0] and seen[1] - self._seen[1] < PROGRESS_BYTES:
            return False
        self._seen = seen
        self._progress += 1
        return True

    def _count_bytes(self) -> int:
        """Return how much this process has read and written; 0 where the system does not count it."""
        try:
            counters = self._process.io_counters()
        except (psutil.Error, OSError, AttributeError):  # AttributeError: this system has no such counters
            return 0
        return int(counters.read_chars + counters.write_chars + counters.read_bytes)

    def _take_suspicion_back(self) -> None:
        self._is_suspicious = False
        self._signs.forget()
        with contextlib.suppress(OSError):
            self._stacks_path.unlink(missing_ok=True)
            self._stacks_path.parent.rmdir()

    def _others_progress(self, now: float) -> bool:
        """Return whether another rank makes progress, for which this one may be waiting."""
        recent = now - self._limit / 4  # this rank has looked for longer
        return any(seen.progress_seconds > recent for seen in self._signs.others.values())

    def _describe(self) -> RankSign:
        self._signs_given += 1
        whereabouts = find_whereabouts()
        return RankSign(
            rank=self._world.rank,
            host=socket.gethostname(),
            pid=self._process.pid,
            started=self._process.create_time(),
            number=self._signs_given,
            progress=self._progress,
            step=self._step,
            marks=self._marks,
            words=whereabouts.words,
            is_collective=whereabouts.is_collective,
        )

    def _write_stacks(self, idle: float) -> None:
        """Write the stacks of all threads; where the run's folder takes no file, to standard error."""
        try:
            make_folder(self._stacks_path.parent)
            with self._stacks_path.open("w", encoding="utf-8") as file:
                date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                file.write(f"{date}: {self._name()} made no progress for {idle:.1f} s after step {self._step}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(_STDERR, all_threads=True)

    def _name(self) -> str:
        return f"rank {self._world.rank}/{self._world.size} on {socket.gethostname()}"

    def _end(self, idle: float) -> NoReturn:
        """Say what is wrong, kill what nobody else may kill, and end the process."""
        self._arm(_END_SECONDS)
        own = self._describe()
        culprits = name_culprits(own, self._signs.others, self._hosts)
        parts = [
            f"error: no progress for {idle:.1f} s after step {self._step}, runtime.hang_timeout_seconds="
            f"{self._limit_seconds:g}: this rank waits in {own.words}",
            *([culprits] if culprits else []),
            f"the stacks are in {self._stacks_path}",
            f"the same command goes on from the newest checkpoint [{self._name()}]\n",
        ]
        os.write(_STDERR, "; ".join(parts).encode(errors="backslashreplace"))  # the main thread may hold sys.stderr
        self._write_stacks(idle)
        self._signs.give(own)
        time.sleep(4 * self._tick + 2 * _GRACE_SECONDS)  # the others say their own, before they lose this rank
        self._kill_left_over()
        os._exit(EXIT_FAILED)

    def _kill_left_over(self) -> None:
        """Kill this rank's children, and ranks of this host that give no sign: they may be stopped."""
        processes: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error, OSError):
            processes += self._process.children(recursive=True)
        for seen in self._signs.others.values():
            sign = seen.sign
            if sign is not None and not seen.is_alive and sign.host == socket.gethostname():
                with contextlib.suppress(psutil.Error, OSError):
                    process = psutil.Process(sign.pid)
                    if process.create_time() == sign.started:
                        processes.append(process)
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()

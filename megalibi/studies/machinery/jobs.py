"""Processes of a study: some at once, each with a log of its own, with progress, and stopped in order."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megalibi.errors import ConfigError
from megalibi.units import format_duration

POLL_SECONDS = 0.2
LINE_EVERY_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""
_LOG_TAIL_BYTES = 1 << 16
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is."""

    done: float
    total: float
    words: str


class Job(Protocol):
    """Something that one process, or a launcher and its ranks, does."""

    @property
    def name(self) -> str:
        """What the console calls it."""

    @property
    def log(self) -> Path:
        """Where its output goes. Only one process at a time can write there, and so do this job."""

    def prepare(self) -> None:
        """Write what the process reads."""

    def command(self, slot: int) -> Sequence[str]:
        """Return what to start as the ``slot``-th of the processes that run at once."""

    def environment(self, slot: int) -> Mapping[str, str]:
        """Return the environment of that process."""

    def progress(self) -> JobProgress | None:
        """Return how far it is; None: not known yet."""

    def finish(self, exit_code: int) -> str | None:
        """Take the result; return why there is none, or None for a good end."""


def run_jobs(jobs: Sequence[Job], *, at_once: int, console: Console) -> None:
    """Run jobs to their ends, some at once.

    One that fails is said at once and does not stop the others. Ctrl-C, SIGTERM and SIGHUP end every running one by
    SIGTERM to its process group, and wait for it; a second Ctrl-C kills.

    Args:
        jobs: In the order in which to start them.
        at_once: How many run at the same time.
        console: Where to show progress.

    Raises:
        ConfigError: A job failed, named with its log; or another process writes to a log.
        KeyboardInterrupt: By a signal, after all running jobs have ended.
    """
    waiting, running, failures = deque(jobs), dict[int, Child](), list[str]()
    with _signals_interrupt(), _Display(console) as display:
        try:
            while waiting or running:
                for slot in range(at_once):
                    if waiting and slot not in running:
                        running[slot] = Child(waiting.popleft(), slot)
                        display.say(f"{running[slot].job.name}: started, log {running[slot].job.log}")
                time.sleep(POLL_SECONDS)
                for slot, child in list(running.items()):
                    display.show(child)
                    if child.process.poll() is not None:
                        failures += _end(running.pop(slot), display)
        except BaseException:
            if running:
                display.say("stopping: what runs saves what it has; the same command goes on")
            _stop(list(running.values()))
            raise
    if failures:
        raise ConfigError("; ".join(failures))


def _end(child: Child, display: _Display) -> list[str]:
    """Take a child's result; return what went wrong, if anything."""
    error = child.job.finish(child.process.returncode)
    display.drop(child)
    if error is None:
        display.say(f"{child.job.name}: done in {format_duration(time.monotonic() - child.began)}")
        return []
    failure = f"{child.job.name} {error}: {child.last_words()} (log {child.job.log})"
    display.say(failure)
    return [failure]


class Child:
    """A running job.

    Args:
        job: What to start; nothing else may be writing to its log.
        slot: As for ``Job.command``.

    Raises:
        ConfigError: It cannot be started, or is running already.
    """

    def __init__(self, job: Job, slot: int) -> None:
        self.job, self.began, self.next_line = job, time.monotonic(), time.monotonic() + LINE_EVERY_SECONDS
        with _open_alone(job) as log:
            self._log_start = log.tell()
            job.prepare()
            try:
                # A session of its own: Ctrl-C on a terminal is ours to pass on, to the launcher and its ranks together.
                self.process = subprocess.Popen(
                    job.command(slot),
                    env=dict(job.environment(slot)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"{job.command(slot)[0]} cannot be started: {error.strerror}") from error

    def last_words(self) -> str:
        """Return the line of the log that says what went wrong: the last error, else the last line."""
        with self.job.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        # Launchers add lines of their own below the one that a rank ends with.
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _open_alone(job: Job) -> BinaryIO:
    """Open a log for appending, locked: the child inherits the lock, which so outlives a study that was killed."""
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
    except OSError as error:
        raise ConfigError(f"{job.log} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        log.close()
        raise ConfigError(f"{job.name} is running already, started by another command: {job.log} is in use") from error
    return log


def _stop(children: Sequence[Child]) -> None:
    for child in children:
        child.signal(signal.SIGTERM)
    try:
        for child in children:
            child.process.wait()
    except KeyboardInterrupt:
        for child in children:
            child.signal(signal.SIGKILL)
        raise


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let what ends a process in silence raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {number: signal.signal(number, interrupt) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """A bar for each running job on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[words]}"),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, child: Child) -> None:
        """Show how far a job is; as a line, if it is due one."""
        name, now = child.job.name, time.monotonic()
        due = now >= child.next_line
        if not (self._console.is_terminal or due):
            return
        progress = child.job.progress()
        if self._console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, words="starting")
            if progress is not None:
                self._bars.update(
                    self._tasks[name], completed=progress.done, total=progress.total, words=progress.words
                )
        elif progress is not None:
            self.say(f"{name}: {progress.words}")
            child.next_line = now + LINE_EVERY_SECONDS

    def drop(self, child: Child) -> None:
        """Take the job's bar away."""
        if child.job.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(child.job.name))

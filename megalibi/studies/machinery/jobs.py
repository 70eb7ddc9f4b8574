"""The processes of a study: several run at once, each with its own log and progress; a signal stops all in order."""

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

from megalibi.console import Progress
from megalibi.errors import FileError, JobError
from megalibi.units import format_duration

POLL_SECONDS = 0.2
LINE_EVERY_SECONDS = 30.0
"""Seconds between two lines of progress of a job where there is no terminal."""
_LOG_TAIL_BYTES = 1 << 16
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is."""

    done: float
    """How much is done, in the unit of ``total``."""
    total: float
    """How much there is to do."""
    words: str
    """How far the job is, in words on one line."""


class StudyJob(Protocol):
    """What one process of a study does, or one launcher with its ranks."""

    @property
    def name(self) -> str:
        """The name of the job on the console."""

    @property
    def log(self) -> Path:
        """The file for the output of the process. Only one process at a time can hold it, so no job runs twice."""

    def prepare(self) -> None:
        """Write the files that the process reads."""

    def command(self, slot: int) -> Sequence[str]:
        """Return the command to start as the ``slot``-th of the processes that run at once."""

    def environment(self, slot: int) -> Mapping[str, str]:
        """Return the environment of that process."""

    def progress(self) -> JobProgress | None:
        """Return how far the job is, or None if that is not known yet."""

    def finish(self, exit_code: int) -> str | None:
        """Take the result after the process has ended; return what went wrong, or None if nothing did."""


def run_jobs(
    jobs: Sequence[StudyJob], *, at_once: int, console: Console, resume: str = "the same command goes on"
) -> None:
    """Run jobs to their ends, several at once.

    A failure is reported at once and does not stop the other jobs. Ctrl-C, SIGTERM and SIGHUP send SIGTERM to the
    process group of every running job and wait for it to end; a second Ctrl-C kills them.

    Args:
        jobs: The jobs, in the order in which they are started.
        at_once: How many run at the same time.
        console: Where to show progress.
        resume: How to go on after an interruption, in words.

    Raises:
        JobError: A job failed, cannot be started, or is running already. The message names it and its log.
        FileError: A log cannot be written.
        KeyboardInterrupt: A signal came; all running jobs have ended.
    """
    waiting, running, failures = deque(jobs), dict[int, Child](), list[str]()
    with _signals_interrupt(), Progress(console, line_every_seconds=LINE_EVERY_SECONDS) as progress:
        try:
            while waiting or running:
                for slot in range(at_once):
                    if waiting and slot not in running:
                        running[slot] = Child(waiting.popleft(), slot)
                        progress.say(f"{running[slot].job.name}: started, log {running[slot].job.log}")
                time.sleep(POLL_SECONDS)
                for slot, child in list(running.items()):
                    _show(child.job, progress)
                    if child.process.poll() is not None:
                        failures += _end(running.pop(slot), progress)
        except BaseException:
            if running:
                progress.say(f"stopping: running jobs save what they have; {resume}")
            _stop(list(running.values()))
            raise
    if failures:
        raise JobError("; ".join(failures))


def _show(job: StudyJob, progress: Progress) -> None:
    """Show how far a job is; without a terminal it is asked only when a line is due, for that reads files."""
    if progress.is_due(job.name):
        known = job.progress()
        if known is None:
            progress.begin(job.name)
        else:
            progress.show(job.name, known.words, done=known.done, total=known.total)


def _end(child: Child, progress: Progress) -> list[str]:
    """Take the result of a child that has ended; return what went wrong, if anything."""
    error = child.job.finish(child.process.returncode)
    progress.drop(child.job.name)
    if error is None:
        progress.say(f"{child.job.name}: done in {format_duration(time.monotonic() - child.began)}")
        return []
    failure = f"{child.job.name} {error}: {child.last_words()} (log {child.job.log})"
    progress.say(failure)
    return [failure]


class Child:
    """A running job.

    Args:
        job: The job to start; nothing else may be writing to its log.
        slot: Its place among the processes that run at once, from 0 on.

    Raises:
        JobError: The job cannot be started, or is running already.
        FileError: Its log cannot be written.
    """

    def __init__(self, job: StudyJob, slot: int) -> None:
        self.job, self.began = job, time.monotonic()
        with _open_alone(job) as log:
            self._log_start = log.tell()
            job.prepare()
            try:
                # The job gets a session of its own, so that a terminal's Ctrl-C reaches us alone, and we pass it on to
                # the launcher and its ranks together.
                self.process = subprocess.Popen(
                    job.command(slot),
                    env=dict(job.environment(slot)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise JobError(f"{job.command(slot)[0]} cannot be started: {error.strerror}") from error

    def last_words(self) -> str:
        """Return the line of the log that says what went wrong: the last line with an error, else the last line."""
        with self.job.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        # Launchers add lines of their own below the line with which a rank ends.
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to everything that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _open_alone(job: StudyJob) -> BinaryIO:
    """Open a log for appending and lock it. The child inherits the lock, which so outlives a study that is killed."""
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
    except OSError as error:
        raise FileError(f"{job.log} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        log.close()
        raise JobError(f"{job.name} is running already, started by another command: {job.log} is in use") from error
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
    """Let the signals that would end this process in silence raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {number: signal.signal(number, interrupt) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Real processes: what they leave, how they fail, how they are stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megalibi.errors import FileError, JobError
from megalibi.studies.machinery.jobs import JobProgress, run_jobs

DEADLINE_SECONDS = 60.0


@dataclass
class Script:
    """A job that runs a piece of Python, which sees its folder as sys.argv[1]."""

    name: str
    folder: Path
    code: str
    prepared: bool = False
    exit_code: int | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def prepare(self) -> None:
        self.prepared = True

    def command(self, slot: int) -> list[str]:
        return [sys.executable, "-c", self.code, str(self.folder), str(slot)]

    def environment(self, slot: int) -> dict[str, str]:
        return {"SLOT": str(slot)}

    def progress(self) -> JobProgress | None:
        return JobProgress(done=1, total=2, words="half")

    def finish(self, exit_code: int) -> str | None:
        self.exit_code = exit_code
        return f"failed with exit code {exit_code}" if exit_code else None


def run(*jobs: Script, at_once: int = 1, shown: StringIO | None = None, **how: str) -> str:
    shown = shown or StringIO()
    run_jobs(jobs, at_once=at_once, console=Console(file=shown, soft_wrap=True), **how)
    return shown.getvalue()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@contextmanager
def signal_when(paths: list[Path], number: signal.Signals) -> Iterator[None]:
    """Send this process a signal once files are there."""

    def send() -> None:
        for path in paths:
            wait_for(path)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_jobs_end_and_leave_their_logs(tmp_path: Path) -> None:
    jobs = [Script(name, tmp_path, "import os; print('slot', os.environ['SLOT'])") for name in ("a", "b", "c")]
    output = run(*jobs, at_once=2)
    assert [job.exit_code for job in jobs] == [0, 0, 0]
    assert all(job.prepared for job in jobs)
    assert {job.log.read_text() for job in jobs} <= {"slot 0\n", "slot 1\n"}
    assert jobs[1].log.read_text() == "slot 1\n"
    assert "a: started, log" in output
    assert "c: done in" in output


def test_as_many_run_at_once_as_are_asked_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; me = Path(sys.argv[1]) / f'on{os.getpid()}'; me.touch();"
        "time.sleep(0.3); print(len(list(me.parent.glob('on*')))); me.unlink()"
    )
    for at_once in (1, 2):
        jobs = [Script(f"{at_once}{name}", tmp_path, code) for name in "abcd"]
        run(*jobs, at_once=at_once)
        assert max(int(job.log.read_text()) for job in jobs) == at_once


def test_a_failure_is_one_line_with_the_log_and_its_error_and_stops_no_other(tmp_path: Path) -> None:
    fails = Script(
        "bad", tmp_path, "print('hello'); print('error: no such thing'); print('killing'); raise SystemExit(3)"
    )
    crashes = Script("crash", tmp_path, "1 / 0")
    good = Script("good", tmp_path, "")
    with pytest.raises(JobError) as error:
        run(fails, crashes, good)
    assert good.exit_code == 0
    assert str(error.value) == (
        f"bad failed with exit code 3: no such thing (log {tmp_path}/bad.log); "
        f"crash failed with exit code 1: ZeroDivisionError: division by zero (log {tmp_path}/crash.log)"
    )


def test_an_earlier_failure_in_the_same_log_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("error: of yesterday\n")
    with pytest.raises(JobError, match=r"exit code 1: it said nothing"):
        run(Script("a", tmp_path, "raise SystemExit(1)"))
    assert (tmp_path / "a.log").read_text() == "error: of yesterday\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_in_order(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "def save(*_): (folder / f'saved{sys.argv[2]}').touch(); time.sleep(0.2); raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / f'ready{sys.argv[2]}').touch()\n"
        "time.sleep(60)"
    )
    jobs = [Script("a", tmp_path, code), Script("b", tmp_path, code), Script("c", tmp_path, "")]
    before, shown = signal.getsignal(signal.SIGTERM), StringIO()
    with signal_when([tmp_path / "ready0", tmp_path / "ready1"], number), pytest.raises(KeyboardInterrupt):
        run(*jobs, at_once=2, shown=shown, resume="to go on: another command")
    assert "running jobs save what they have; to go on: another command\n" in shown.getvalue()
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert not (tmp_path / "c.log").exists()  # nothing is started any more
    assert signal.getsignal(signal.SIGTERM) is before


def test_children_of_a_job_are_signalled_too(tmp_path: Path) -> None:
    """As the ranks of a launcher whose front process passes nothing on."""
    rank = (
        "import signal, sys, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "def save(*_): (folder / 'saved').touch(); raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, save); (folder / 'ready').touch(); time.sleep(60)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}, sys.argv[1]])"
    with signal_when([tmp_path / "ready"], signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run(Script("a", tmp_path, launcher))
    wait_for(tmp_path / "saved")


def test_a_job_that_outlives_its_study_is_not_started_twice(tmp_path: Path) -> None:
    """The lock is the child's: a study that was killed does not take it along."""
    code = (
        "import os, sys; from pathlib import Path; folder = Path(sys.argv[1]); "
        "(folder / 'pid').write_text(str(os.getpid())); (folder / 'ready').touch(); import time; time.sleep(60)"
    )
    study = os.fork()
    if study == 0:
        try:
            run(Script("a", tmp_path, code))
        finally:
            os._exit(0)
    wait_for(tmp_path / "ready")
    os.kill(study, signal.SIGKILL)
    os.waitpid(study, 0)
    again = Script("a", tmp_path, "")
    with pytest.raises(JobError, match=r"a is running already, started by another command: .*a\.log is in use"):
        run(again)
    assert not again.prepared
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while again.exit_code is None and time.monotonic() < deadline:  # until the killed one is gone
        with suppress(JobError):
            run(again)
    assert again.exit_code == 0


def test_a_log_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = Script("a", tmp_path / "file", "")
    with pytest.raises(FileError, match=r"file/a\.log cannot be written: "):
        run(job)
    assert not job.prepared


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    job = Script("a", tmp_path, "")
    job.command = lambda slot: ["no-such-launcher"]  # type: ignore[method-assign]
    with pytest.raises(JobError, match="no-such-launcher cannot be started: No such file"):
        run(job)

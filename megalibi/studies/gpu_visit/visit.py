"""A visit to a machine: steps in order of worth, each a process with a limit of its own, and none of them done twice.

A step that fails or hangs does not stop the next one, and what is known is written after every step: a visit that is
cut off has brought home what it had, and the same command goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megalibi.errors import ConfigError
from megalibi.files import make_folder
from megalibi.metrics.provenance import write_json
from megalibi.studies.machinery.jobs import POLL_SECONDS, Child
from megalibi.units import format_duration

SUMMARY_FILE, LOGS_FOLDER = "summary.json", "logs"
DONE, FAILED, OUT_OF_TIME, SKIPPED, INTERRUPTED = "done", "failed", "out of time", "skipped", "interrupted"
GRACE_SECONDS = 5.0
"""An interrupted step has so long to end by itself."""
_LAST_SECONDS = 2.0
"""Kept back at the end of a visit, so that the last results can be written."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to find out."""

    name: str
    """What the console, the files and ``--only`` call it."""
    what: str
    """What it finds out, for people."""
    command: tuple[str, ...]
    """What to start."""
    limit: float
    """Seconds after which it is killed."""
    expected: float = 0.0
    """Seconds that it takes, an estimate; 0: nobody knows."""
    least: float = 0.0
    """Seconds that must be left for it to be started."""
    output: Path | None = None
    """What it writes."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside that of all steps."""
    in_background: bool = False
    """The next steps do not wait for it."""
    after: str = ""
    """A step in the background whose end to wait for."""
    impossible: str = ""
    """Why it cannot be done here; empty: it can."""


def expect_seconds(steps: Sequence[Step]) -> float:
    """Return the seconds that steps take in their order, an estimate from theirs, without those that are impossible."""
    now, ends = 0.0, {"": 0.0}
    for step in steps:
        if not step.impossible:
            now = max(now, ends.get(step.after, 0.0))
            ends[step.name] = now + step.expected
            now = now if step.in_background else ends[step.name]
    return max(ends.values())


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What came of a step."""

    name: str
    what: str
    status: str
    """done, failed, out of time, skipped or interrupted."""
    seconds: float = 0.0
    """That it took."""
    said: str = ""
    """Why it was not done."""
    command: str = ""
    """With shell quotes."""
    commit: str = ""
    date: str = ""
    """When it began."""

    @property
    def is_finished(self) -> bool:
        """Whether it came to an end of its own, and need not be done again."""
        return self.status in (DONE, FAILED)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Where a visit writes, how long it may take, and who is told."""

    folder: Path
    """For summary.json, logs, and what the steps write."""
    seconds: float
    """In all, from now on."""
    environment: Mapping[str, str]
    """Of every step."""
    facts: Mapping[str, Any]
    """Machine, versions, commit and date: what summary.json begins with."""
    say: Callable[[str], None]
    """Takes lines of progress."""
    changed: Callable[[Sequence[StepRecord]], None] = lambda records: None
    """Called after every step, when summary.json has it."""
    show_command: Callable[[Sequence[str]], str] = " ".join
    """How a command is recorded."""

    def log(self, name: str) -> Path:
        """Return where a step's output goes."""
        return self.folder / LOGS_FOLDER / f"{name}.log"


def read_records(folder: Path) -> dict[str, StepRecord]:
    """Return what is known of the steps of a visit to a folder, by name; nothing before the first.

    Raises:
        ConfigError: summary.json cannot be read.
    """
    path = folder / SUMMARY_FILE
    if not path.exists():
        return {}
    try:
        records = [StepRecord(**record) for record in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a visit's ({error!r}): move it away, or give another folder") from error
    return {record.name: record for record in records}


def run_visit(steps: Sequence[Step], visit: Visit, *, again: Collection[str] = ()) -> list[StepRecord]:
    """Do what has not come to an end yet, in order; and write summary.json after every step.

    Args:
        steps: Those of this call.
        visit: Where, and how long.
        again: Names of steps to do in any case; their old results are removed.

    Returns:
        What is known of all steps, those of earlier calls included.

    Raises:
        ConfigError: A step is running already, or the folder cannot be written.
        KeyboardInterrupt: After the running steps have been stopped and all is written.
    """
    make_folder(visit.folder / LOGS_FOLDER)
    runner = _Runner(steps, visit)
    try:
        for step in steps:
            known = runner.records.get(step.name)
            if known is not None and known.is_finished and step.name not in again:
                hint = f", --again {step.name} repeats it" if known.status == FAILED else ""
                runner.say(step, f"{known.status} before{hint}")
            else:
                runner.do(step, anew=step.name in again)
        runner.wait_for(list(runner.running))
    except BaseException:
        runner.stop()
        raise
    return list(runner.records.values())


@dataclass(kw_only=True)
class _Running:
    """A step that is running; a Job, as ``Child`` wants it."""

    step: Step
    visit: Visit
    limit: float
    began: float
    date: str
    child: Child = field(init=False)

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def log(self) -> Path:
        return self.visit.log(self.step.name)

    def prepare(self) -> None:
        """Nothing is."""

    def command(self, slot: int) -> Sequence[str]:
        return self.step.command

    def environment(self, slot: int) -> Mapping[str, str]:
        return {**self.visit.environment, **self.step.environment}

    def progress(self) -> None:
        """Its limit is all that is known."""

    def finish(self, exit_code: int) -> str | None:
        return None if exit_code == 0 else f"exit code {exit_code}"

    def find_end(self) -> tuple[str, str] | None:
        """Return how it ended and why, killing it if it is over its limit; None: it runs."""
        exit_code = self.child.process.poll()
        if exit_code is None and time.monotonic() - self.began < self.limit:
            return None
        self.child.signal(signal.SIGKILL)  # what it has started too, even if it has ended itself
        self.child.process.wait()
        if exit_code is None:
            return OUT_OF_TIME, f"killed after {self.limit:.0f} s: {self.child.last_words()}"
        error = self.finish(exit_code)
        return (DONE, "") if error is None else (FAILED, f"{error}: {self.child.last_words()}")


class _Runner:
    """The state of a visit."""

    def __init__(self, steps: Sequence[Step], visit: Visit) -> None:
        self.records = read_records(visit.folder)
        self.running: dict[str, _Running] = {}
        self._visit, self._began = visit, time.monotonic()
        self._numbers = {step.name: number for number, step in enumerate(steps, start=1)}

    def say(self, step: Step, words: str) -> None:
        self._visit.say(f"[{self._numbers[step.name]}/{len(self._numbers)}] {step.name}: {words}")

    def do(self, step: Step, *, anew: bool) -> None:
        """Run a step to its end, or start it if it is one for the background."""
        self.wait_for([step.after])
        left = self._visit.seconds - (time.monotonic() - self._began) - _LAST_SECONDS
        if step.impossible or left < max(step.least, 1.0):
            reason = step.impossible or f"{max(0.0, left):.0f} s left, {max(step.least, 1.0):.0f} s are needed"
            self._record(step, SKIPPED, said=reason)
            return
        if anew and step.output is not None:
            step.output.unlink(missing_ok=True)
        limit = min(step.limit, left)
        self.say(step, f"{step.what}; at most {format_duration(limit)} of {format_duration(left)} left")
        running = _Running(
            step=step,
            visit=self._visit,
            limit=limit,
            began=time.monotonic(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        running.child = Child(running, 0)
        self.running[step.name] = running
        if not step.in_background:
            self.wait_for([step.name])

    def wait_for(self, names: Sequence[str]) -> None:
        """Wait for the ends of steps, and take those of others that end meanwhile."""
        while True:
            for running in list(self.running.values()):
                self._take(running)
            if not any(name in self.running for name in names):
                return
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End what is running: first by asking for it."""
        for running in self.running.values():
            running.child.signal(signal.SIGTERM)
        for running in list(self.running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.child.process.wait(GRACE_SECONDS)
            running.child.signal(signal.SIGKILL)
            running.child.process.wait()
            del self.running[running.name]
            self._record(running.step, INTERRUPTED, running)

    def _take(self, running: _Running) -> None:
        end = running.find_end()
        if end is not None:
            del self.running[running.name]
            self._record(running.step, end[0], running, said=end[1])

    def _record(self, step: Step, status: str, running: _Running | None = None, said: str = "") -> None:
        seconds = 0.0 if running is None else time.monotonic() - running.began
        self.records[step.name] = StepRecord(
            name=step.name,
            what=step.what,
            status=status,
            seconds=round(seconds, 1),
            said=said,
            command=self._visit.show_command(step.command),
            commit=str(self._visit.facts.get("commit", "")),
            date="" if running is None else running.date,
        )
        self.say(step, f"{status}{f' in {seconds:.1f} s' if running else ''}{f': {said}' if said else ''}")
        records = list(self.records.values())
        summary = {**self._visit.facts, "steps": [dataclasses.asdict(record) for record in records]}
        write_json(summary, self._visit.folder / SUMMARY_FILE)
        self._visit.changed(records)

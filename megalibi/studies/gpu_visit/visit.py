"""A visit to a machine: steps in order of worth, each a process with a time limit of its own, and none is done twice.

A step that fails or hangs does not stop the next one, and results are written after every step. A visit that is cut off
so keeps what it had, and the same command goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megalibi.files import make_folder, write_json
from megalibi.studies.gpu_visit.step import (
    DONE,
    FAILED,
    INTERRUPTED,
    LOGS_FOLDER,
    OUT_OF_TIME,
    SKIPPED,
    SUMMARY_FILE,
    StepOutcome,
    VisitStep,
    read_outcomes,
)
from megalibi.studies.machinery.jobs import POLL_SECONDS, Child
from megalibi.units import format_duration

GRACE_SECONDS = 5.0
"""Seconds that an interrupted step has to end by itself."""
_LAST_SECONDS = 2.0
"""Seconds that are kept back at the end of a visit to write the last results."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Where a visit writes, how long it may take, and whom it tells."""

    folder: Path
    """The folder for summary.json, the logs and the files of the steps."""
    seconds: float
    """Seconds that the whole visit may take."""
    environment: Mapping[str, str]
    """The environment of every step."""
    facts: Mapping[str, Any]
    """Machine, versions, commit and date, with which summary.json begins."""
    say: Callable[[str], None]
    """Called with each line of progress."""
    changed: Callable[[Sequence[StepOutcome]], None] = lambda outcomes: None
    """Called with all outcomes after every step, once summary.json is written."""
    show_command: Callable[[Sequence[str]], str] = " ".join
    """Turns a command into the text that is recorded."""

    def log(self, name: str) -> Path:
        """Return the file that gets the output of a step."""
        return self.folder / LOGS_FOLDER / f"{name}.log"


def run_visit(steps: Sequence[VisitStep], visit: Visit, *, again: Collection[str] = ()) -> list[StepOutcome]:
    """Do in order the steps that have not ended by themselves yet, and write summary.json after each.

    Args:
        steps: The steps of this call.
        visit: Where to write, and how long it may take.
        again: Names of steps to repeat in any case; their old results are removed.

    Returns:
        What is known of all steps, including those of earlier calls.

    Raises:
        JobError: A step is running already.
        FileError: The folder cannot be written, or its summary.json is not that of a visit.
        KeyboardInterrupt: A signal came; the running steps have been stopped and the results are written.
    """
    make_folder(visit.folder / LOGS_FOLDER)
    runner = _Runner(steps, visit)
    try:
        for step in steps:
            known = runner.outcomes.get(step.name)
            if known is not None and known.is_finished and step.name not in again:
                hint = f", --again {step.name} repeats it" if known.status == FAILED else ""
                runner.say(step, f"{known.status} before{hint}")
            else:
                runner.do(step, anew=step.name in again)
        runner.wait_for(list(runner.running))
    except BaseException:
        runner.stop()
        raise
    return list(runner.outcomes.values())


@dataclass(kw_only=True)
class _Running:
    """A step that is running: the StudyJob that ``Child`` starts."""

    step: VisitStep
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
        """Do nothing: the command says everything."""

    def command(self, slot: int) -> Sequence[str]:
        return self.step.command

    def environment(self, slot: int) -> Mapping[str, str]:
        return {**self.visit.environment, **self.step.environment}

    def progress(self) -> None:
        """Return None: only its limit is known."""

    def finish(self, exit_code: int) -> str | None:
        return None if exit_code == 0 else f"exit code {exit_code}"

    def find_end(self) -> tuple[str, str] | None:
        """Return how it ended and why, or None while it runs; a step over its limit is ended."""
        exit_code = self.child.process.poll()
        if exit_code is None and time.monotonic() - self.began < self.limit:
            return None
        if exit_code is None:
            said = self.child.last_words()
            self._interrupt()
            return OUT_OF_TIME, f"ended after {self.limit:.0f} s: {said}"
        self.child.signal(signal.SIGKILL)  # and everything that it has started, even if it has ended itself
        self.child.process.wait()
        error = self.finish(exit_code)
        return (DONE, "") if error is None else (FAILED, f"{error}: {self.child.last_words()}")

    def _interrupt(self) -> None:
        """Let it end in order: pytest writes its list, a study ends its trainings, which have sessions of their own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.child.signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.process.wait(GRACE_SECONDS)
                break
        self.child.signal(signal.SIGKILL)
        self.child.process.wait()


class _Runner:
    """The state of a visit."""

    def __init__(self, steps: Sequence[VisitStep], visit: Visit) -> None:
        self.outcomes = read_outcomes(visit.folder)
        self.running: dict[str, _Running] = {}
        self._visit, self._began = visit, time.monotonic()
        self._numbers = {step.name: number for number, step in enumerate(steps, start=1)}

    def say(self, step: VisitStep, words: str) -> None:
        self._visit.say(f"[{self._numbers[step.name]}/{len(self._numbers)}] {step.name}: {words}")

    def do(self, step: VisitStep, *, anew: bool) -> None:
        """Run a step to its end, or only start it if it belongs in the background."""
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
        """Wait for the ends of steps, and record other steps that end meanwhile."""
        while True:
            for running in list(self.running.values()):
                self._take(running)
            if not any(name in self.running for name in names):
                return
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End all running steps: first by asking, then by killing."""
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

    def _record(self, step: VisitStep, status: str, running: _Running | None = None, said: str = "") -> None:
        seconds = 0.0 if running is None else time.monotonic() - running.began
        self.outcomes[step.name] = StepOutcome(
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
        outcomes = list(self.outcomes.values())
        summary = {**self._visit.facts, "steps": [dataclasses.asdict(outcome) for outcome in outcomes]}
        write_json(summary, self._visit.folder / SUMMARY_FILE)
        self._visit.changed(outcomes)

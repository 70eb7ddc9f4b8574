"""One step of a visit: what it finds out and how, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalibi.errors import FileError

SUMMARY_FILE, LOGS_FOLDER = "summary.json", "logs"
DONE, FAILED, OUT_OF_TIME, SKIPPED, INTERRUPTED = "done", "failed", "out of time", "skipped", "interrupted"


@dataclass(frozen=True, kw_only=True)
class VisitStep:
    """One thing to find out, by a process of its own."""

    name: str
    """The name of the step on the console, in file names and for ``--only``."""
    what: str
    """What it finds out, in words."""
    command: tuple[str, ...]
    """The command that starts the process, by arguments."""
    limit: float
    """Seconds after which the process is killed."""
    expected: float = 0.0
    """Seconds that it is expected to take, an estimate; 0 means unknown."""
    least: float = 0.0
    """Seconds of the visit that must be left to start it."""
    output: Path | None = None
    """The file that it writes, if it writes one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to add to the environment of all steps."""
    in_background: bool = False
    """Whether the next steps start without waiting for its end."""
    after: str = ""
    """Name of a step in the background that must end first; empty means none."""
    impossible: str = ""
    """Why it cannot be done here; empty means that it can."""


def expect_seconds(steps: Sequence[VisitStep]) -> float:
    """Return the seconds that steps are expected to take in this order; impossible steps take none."""
    now, ends = 0.0, {"": 0.0}
    for step in steps:
        if not step.impossible:
            now = max(now, ends.get(step.after, 0.0))
            ends[step.name] = now + step.expected
            now = now if step.in_background else ends[step.name]
    return max(ends.values())


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What came of a step."""

    name: str
    """The name of the step."""
    what: str
    """What it finds out, in words."""
    status: str
    """How it ended: done, failed, out of time, skipped or interrupted."""
    seconds: float = 0.0
    """Seconds that the process took."""
    said: str = ""
    """Why it was not done; empty if it was."""
    command: str = ""
    """Its command, quoted for a shell."""
    commit: str = ""
    """The commit of the code that was measured."""
    date: str = ""
    """When it began, as ISO 8601 has it."""

    @property
    def is_finished(self) -> bool:
        """Whether it ended by itself, so that it need not be repeated."""
        return self.status in (DONE, FAILED)


def read_outcomes(folder: Path) -> dict[str, StepOutcome]:
    """Return what is known of the steps of a visit, by name; nothing before the first step.

    Args:
        folder: The folder that the visit writes to.

    Raises:
        FileError: summary.json is not that of a visit.
    """
    path = folder / SUMMARY_FILE
    if not path.exists():
        return {}
    try:
        outcomes = [StepOutcome(**record) for record in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is not a visit's ({error!r}): move it away, or give another folder") from error
    return {outcome.name: outcome for outcome in outcomes}

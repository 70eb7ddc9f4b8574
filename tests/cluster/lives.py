"""The lives of a run that meets faults: what ended each, how long that took, and the distribution over many."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

KINDS = ("kill_rank", "kill_all", "hang", "cut", "preempt")


@dataclass(kw_only=True)
class Life:
    """One life of the run, from its start to the end that a fault put to it."""

    kind: str
    """The kind of the fault, one of KINDS."""
    victim: str
    """The rank or the host that the fault struck."""
    phase: str
    """Whether the ranks were starting or training."""
    resumed_from: int
    """The step of the checkpoint that this life took, 0 if there was none."""
    last_step: int
    """The last step that was done before the fault ended it."""
    ranks_end_seconds: float
    """The time from the fault to the end of the last rank."""
    launcher_end_seconds: float | None
    """The time from the fault to the end of the launcher; None if it had to be killed after a cut."""
    culprit_is_named: bool | None
    """Whether a rank named who holds it up; False: it wrote its stacks alone; None: the fault holds nobody up."""
    restart_to_step_seconds: float | None = None
    """The time from the next start to its first step; None if the next fault came before."""


def describe_life(life: Life) -> str:
    """Return in words what ended a life, and after which time."""
    seconds = life.launcher_end_seconds
    end = f"ended after {seconds:.1f} s" if seconds is not None else "mpirun had to be killed"
    return f"{life.kind} of {life.victim} after step {life.last_step}: {end}"


def summarize_lives(lives: list[Life]) -> dict[str, Any]:
    """Return the distribution of each measured time, in seconds, by the kind of the fault."""
    return {kind: _summarize([life for life in lives if life.kind == kind]) for kind in KINDS}


def _summarize(lives: list[Life]) -> dict[str, Any]:
    """Return the distribution over lives that one kind of fault has ended."""
    names = ("ranks_end_seconds", "launcher_end_seconds", "restart_to_step_seconds")
    columns = {name: sorted(value for life in lives if (value := getattr(life, name)) is not None) for name in names}
    named = [life.culprit_is_named for life in lives if life.culprit_is_named is not None]
    return (
        {"faults": len(lives)}
        | ({"culprit_named": sum(named)} if named else {})
        | {
            name: {
                "min": values[0],
                "median": round(statistics.median(values), 2),
                "p90": values[int(0.9 * (len(values) - 1) + 0.5)],
                "max": values[-1],
            }
            for name, values in columns.items()
            if values
        }
    )

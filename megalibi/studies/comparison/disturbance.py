"""Whether a speed was disturbed: how far apart its turns lie, and what went on beside them.

Nothing but the turns themselves decides. The load beside them is recorded so that a reader sees why they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MIN_TURNS = 3
"""Fewer turns decide nothing: of two that differ nobody can say which one was disturbed."""
DISTURBED = 0.05
"""A speed is disturbed if the medians of its turns lie further apart than this share of their median. It has to show
differences of 7.1% and 13.1% in updates an hour (the paper's Table 11): turns of one model that themselves lie as far
apart as the smaller of these show neither, and 5% leaves a margin below it. It is not less, because gains are taken
turn by turn, where what slows down both models of a pair cancels out."""


@dataclass(frozen=True, kw_only=True)
class TurnConditions:
    """How evenly a turn went, and what went on beside it."""

    step_spread: float
    """Interquartile range of the seconds of its counted steps, over their median."""
    load_before: float | None
    """Load average of the last minute before the turn, which counts the turns before it too; None: not known."""
    load_after: float | None
    """Load average of the last minute after its steps, which counts the turn itself too; None: not known."""
    other_busy_cores: float | None
    """Cores that others kept busy during its steps; None: not known, as on several ranks."""


def relative_range(turn_medians: Mapping[int, float]) -> float:
    """Return how far the turns lie apart: the range of their medians over the median of these.

    Args:
        turn_medians: Number of a turn -> median seconds of its steps; at least one.
    """
    values = list(turn_medians.values())
    return (max(values) - min(values)) / float(np.median(values))


def find_disturbance(turn_medians: Mapping[int, float]) -> str:
    """Return why nothing can be decided by a speed, in words; empty if it was not disturbed.

    Args:
        turn_medians: Number of a turn -> median seconds of its steps; at least one.
    """
    if len(turn_medians) < MIN_TURNS:
        return f"too few turns ({len(turn_medians)}, not {MIN_TURNS})"
    spread = relative_range(turn_medians)
    return f"disturbed, {spread:.1%} between its turns" if spread > DISTURBED else ""


def find_slow_turns(turn_medians: Mapping[int, float]) -> list[int]:
    """Return the numbers of the turns to measure again: other work slows down, so the fastest one had the least of it.

    Args:
        turn_medians: Number of a turn -> median seconds of its steps; at least one.

    Returns:
        What took more than DISTURBED longer than the fastest turn, by rising number; none if the turns are close.
    """
    if relative_range(turn_medians) <= DISTURBED:
        return []
    fastest = min(turn_medians.values())
    return sorted(number for number, seconds in turn_medians.items() if seconds > (1.0 + DISTURBED) * fastest)

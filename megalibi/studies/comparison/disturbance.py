"""Whether a speed was disturbed: how far apart its turns lie, and how much other work went on beside them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MIN_TURNS = 3
"""Fewer turns decide nothing: of two that differ nobody can say which one was disturbed."""
DISTURBED = 0.035
"""A speed is disturbed if two of its turns differ by more than this share of their median, on average over all pairs of
turns. It has to show differences of 7.1% and 13.1% in updates an hour (the paper's Table 11): this is half of the
smaller one. It is not less, because gains are taken turn by turn, where what slows down both models of a pair cancels
out. Unlike a range, the mean over pairs does not grow with the number of turns."""
OTHER_WORK = 0.25
"""A speed is disturbed if others kept more cores busy than this in the median of its turns: steady work beside all of
them does not set the turns apart, and yet it slows down all of them."""


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


def mean_difference(turn_medians: Mapping[int, float]) -> float:
    """Return how far two turns lie apart on average: the mean difference over all pairs, over the median of all turns.

    Args:
        turn_medians: Number of a turn -> median seconds of its steps; at least one.

    Returns:
        A share; 0 for a single turn.
    """
    differences = [abs(a - b) for a, b in itertools.combinations(turn_medians.values(), 2)]
    return float(np.mean(differences) / np.median(list(turn_medians.values()))) if differences else 0.0


def describe_disturbances(turn_medians: Mapping[int, float], other_busy_cores: Mapping[int, float]) -> list[str]:
    """Return what disturbed a speed, in words, whatever the number of its turns; none if nothing did.

    Args:
        turn_medians: Number of a turn -> median seconds of its steps; at least one.
        other_busy_cores: Number of a turn -> cores that others kept busy, of the turns where that is known and counts.
    """
    spread, found = mean_difference(turn_medians), []
    if spread > DISTURBED:
        found.append(f"{spread:.1%} between its turns")
    if other_busy_cores and (cores := float(np.median(list(other_busy_cores.values())))) > OTHER_WORK:
        found.append(f"{cores:.2f} cores busy with other work")
    return found


def find_disturbance(turn_medians: Mapping[int, float], other_busy_cores: Mapping[int, float]) -> str:
    """Return why nothing can be decided by a speed, in words; empty if it was not disturbed.

    Args:
        turn_medians: As describe_disturbances takes them.
        other_busy_cores: As describe_disturbances takes them.
    """
    if len(turn_medians) < MIN_TURNS:
        return f"too few turns ({len(turn_medians)}, not {MIN_TURNS})"
    found = describe_disturbances(turn_medians, other_busy_cores)
    return f"disturbed, {', '.join(found)}" if found else ""


def find_disturbed_turns(turn_medians: Mapping[int, float], other_busy_cores: Mapping[int, float]) -> list[int]:
    """Return the numbers of the turns to measure again: other work slows down, so the fastest one had the least of it.

    Args:
        turn_medians: As describe_disturbances takes them.
        other_busy_cores: As describe_disturbances takes them.

    Returns:
        What took more than DISTURBED longer than the fastest turn, and what was measured beside more than OTHER_WORK,
        by rising number; none if the speed was not disturbed.
    """
    if not describe_disturbances(turn_medians, other_busy_cores):
        return []
    fastest = min(turn_medians.values())
    slow = {number for number, seconds in turn_medians.items() if seconds > (1.0 + DISTURBED) * fastest}
    return sorted(slow | {number for number, cores in other_busy_cores.items() if cores > OTHER_WORK})

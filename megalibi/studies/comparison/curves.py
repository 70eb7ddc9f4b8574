"""Perplexity against time as in Figure 5 of arXiv:2108.12409, and how "11% faster" is read off such curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_POINTS = 5
"""Points of training at which the times of two models are compared (section 4.2)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A checkpoint, or a moment between two."""

    updates: float
    """Optimizer steps done: a whole number at a checkpoint, a fraction between two."""
    hours: float
    """Hours that these steps took."""
    perplexity: float
    """Perplexity of the validation text."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A perplexity that two models reach, and when each reaches it."""

    perplexity: float
    """The perplexity that both reach."""
    hours: float
    """Hours after which the model reaches it."""
    baseline_hours: float
    """Hours after which the model that it is compared with reaches it."""

    @property
    def speedup(self) -> float:
        """By what share the model is faster: 0.1 is 10% faster."""
        return self.baseline_hours / self.hours - 1.0


class Curve:
    """Perplexity as a falling function of time, whose logarithm is linear between checkpoints.

    A checkpoint that is no better than an earlier one is left out, because the earlier perplexity stays reached.

    Args:
        points: One checkpoint or more, by rising time.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        best = np.minimum.accumulate([point.perplexity for point in points])
        kept = [p for i, p in enumerate(points) if i == 0 or p.perplexity < best[i - 1]]
        self.hours = np.array([point.hours for point in kept])
        self.log_perplexities = np.log([point.perplexity for point in kept])

    @property
    def highest(self) -> float:
        """Perplexity of the first checkpoint."""
        return float(np.exp(self.log_perplexities[0]))

    @property
    def lowest(self) -> float:
        """Perplexity of the best checkpoint."""
        return float(np.exp(self.log_perplexities[-1]))

    def hours_to(self, perplexity: float) -> float:
        """Return the hours after which a perplexity between the highest and the lowest is reached."""
        return float(np.interp(-np.log(perplexity), -self.log_perplexities, self.hours))

    def perplexity_at(self, hours: float) -> float:
        """Return the perplexity after some hours, from the first checkpoint to the best one."""
        return float(np.exp(np.interp(hours, self.hours, self.log_perplexities)))


def compare_times(points: Sequence[Point], baseline_points: Sequence[Point]) -> list[Level]:
    """Return when two models reach the perplexities of the baseline at five evenly spaced moments of its training.

    "By sampling five evenly distributed points across the training process, we compute that our L = 1024 model reaches
    a given perplexity value, on average, 11% faster" (arXiv:2108.12409, section 4.2). The moments are evenly spaced in
    time from the highest to the lowest perplexity that the two have in common.

    Args:
        points: Checkpoints of the model, by rising time.
        baseline_points: Checkpoints of the model that it is compared with.

    Returns:
        Five levels by falling perplexity, or none if the two have no range of perplexities in common.
    """
    curve, baseline = Curve(points), Curve(baseline_points)
    highest, lowest = min(curve.highest, baseline.highest), max(curve.lowest, baseline.lowest)
    if highest <= lowest:
        return []
    moments = np.linspace(baseline.hours_to(highest), baseline.hours_to(lowest), NUM_POINTS)
    perplexities = [highest, *(baseline.perplexity_at(hours) for hours in moments[1:-1]), lowest]
    return [Level(perplexity=p, hours=curve.hours_to(p), baseline_hours=baseline.hours_to(p)) for p in perplexities]


def mean_speedup(levels: Sequence[Level]) -> float:
    """Return by what share the model is faster on average over the levels."""
    return float(np.mean([level.speedup for level in levels]))


def stand_at(points: Sequence[Point], hours: float) -> Point | None:
    """Return where a run that is stopped at a time stands, or None before its first checkpoint.

    Between two checkpoints the logarithm of the perplexity and the updates are linear in time. Unlike in a Curve every
    checkpoint counts, whether it is better than the ones before or not.

    Args:
        points: Checkpoints of the run, by rising time.
        hours: The time at which it is stopped; after the last checkpoint the result is that checkpoint.
    """
    if hours < points[0].hours:
        return None
    if hours >= points[-1].hours:
        return points[-1]
    known = [point.hours for point in points]
    log_perplexity = np.interp(hours, known, np.log([point.perplexity for point in points]))
    updates = np.interp(hours, known, [point.updates for point in points])
    return Point(updates=float(updates), hours=hours, perplexity=float(np.exp(log_perplexity)))

"""Curves of several seeds as one: the mean of each value, and how far the seeds lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalibi.studies.extrapolation.study import Curves, SeedCurves


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number of several seeds."""

    mean: float
    """The arithmetic mean over the seeds."""
    low: float
    """The lowest value of a seed."""
    high: float
    """The highest value of a seed."""

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(mean=sum(values) / len(values), low=min(values), high=max(values))


SpreadCurves = Mapping[str, Mapping[str, Mapping[int, Spread]]]
"""Protocol -> curve, by a key of METHOD_NAMES -> evaluation length -> perplexity over the seeds."""


def spread_curves(curves: SeedCurves) -> SpreadCurves:
    """Return the curves of all seeds as one.

    Args:
        curves: Perplexities by seed, protocol and position method; every seed has the same methods and lengths.
    """
    first = next(iter(curves.values()))
    return {
        protocol: {
            method: {
                length: Spread.of_values([of_seed[protocol][method][length] for of_seed in curves.values()])
                for length in line
            }
            for method, line in lines.items()
        }
        for protocol, lines in first.items()
    }


def mean_curves(curves: SeedCurves) -> Curves:
    """Return the mean perplexities over the seeds, by protocol and position method."""
    return {
        protocol: {m: {length: spread.mean for length, spread in line.items()} for m, line in lines.items()}
        for protocol, lines in spread_curves(curves).items()
    }

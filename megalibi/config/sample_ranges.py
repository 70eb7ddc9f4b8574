"""Ranges of sample numbers: what ``data.skip`` leaves out of the order of the training data.

A sample's number is its place in that order, from 0. It does not depend on what is left out, nor on the topology. A
position, on the other hand, counts the samples that a run has consumed: position p is the p-th number that is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megalibi.config.checks import MAX_WHOLE_NUMBER, refuse

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class SampleRanges:
    """Numbers of samples, as ranges that neither overlap nor touch."""

    ranges: tuple[tuple[int, int], ...] = ()
    """The first and the last number of each range, in rising order."""

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> SampleRanges:
        """Join ranges of first and last numbers, which may overlap and stand in any order."""
        joined: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if joined and first <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return cls(tuple(joined))

    @classmethod
    def parse(cls, texts: Iterable[str], name: str = "data.skip") -> SampleRanges:
        """Read ranges as they are typed: ``128-135``, or ``400`` for a single sample.

        Args:
            texts: The ranges.
            name: The field that has them.

        Raises:
            ConfigError: One is no range.
        """
        ranges = []
        for place, text in enumerate(texts):
            match = _RANGE.fullmatch(text.strip())
            first, last = (int(number) for number in (match[1], match[2] or match[1])) if match else (1, 0)
            if not first <= last < MAX_WHOLE_NUMBER:
                requirement = "be FIRST-LAST, the numbers of the first and the last sample that are left out"
                refuse(f"{name}[{place}]", text, requirement)
            ranges.append((first, last))
        return cls.of(ranges)

    def spell(self) -> list[str]:
        """Return the ranges as ``parse`` reads them."""
        return [str(first) if first == last else f"{first}-{last}" for first, last in self.ranges]

    def __str__(self) -> str:
        """Return the ranges as they are typed into a configuration: ``[128-135,400]``."""
        return f"[{','.join(self.spell())}]"

    def __or__(self, other: SampleRanges) -> SampleRanges:
        """Return the numbers that are in one of the two, or in both."""
        return SampleRanges.of(self.ranges + other.ranges)

    def below(self, limit: int) -> SampleRanges:
        """Return the numbers below a limit."""
        return SampleRanges(tuple((first, min(last, limit - 1)) for first, last in self.ranges if first < limit))

    def number_at(self, position: int) -> int:
        """Return the number of the sample at a position, where these numbers are left out."""
        number = position
        for first, last in self.ranges:
            if first > number:
                break
            number += last - first + 1
        return number

    def kept(self, position: int, count: int) -> SampleRanges:
        """Return the numbers of ``count`` samples from a position on, where these numbers are left out."""
        start, stop = self.number_at(position), self.number_at(position + count - 1) + 1
        inside = [(first, last) for first, last in self.below(stop).ranges if first > start]
        firsts = [start, *(last + 1 for _, last in inside)]
        lasts = [*(first - 1 for first, _ in inside), stop - 1]
        return SampleRanges(tuple(zip(firsts, lasts, strict=True)))

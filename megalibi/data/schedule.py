"""Which set of a blend comes next: exact shares at every prefix, any index found at once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megalibi.errors import ConfigError

Int64Array = npt.NDArray[np.int64]

_MAX_PERIOD = 2**20  # 12 MB of tables; weights of up to six decimals that sum to one always fit


class BlendSchedule:
    """The order in which the sets of a blend take turns.

    Weights are taken as the decimals the user wrote, so that the order repeats after a whole number of samples: one
    period is computed and stored, any index is then two look-ups. At every prefix each set's count is within one
    sample of its share.

    Args:
        weights: Shares of any scale, all above 0.

    Raises:
        ConfigError: If a weight is not a number above 0, or the period is longer than 2**20 samples.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"data: blend weights {list(weights)}: each must be a finite number above 0")
        shares = _integer_shares(weights)
        self.period = sum(shares)
        if self.period > _MAX_PERIOD:
            raise ConfigError(
                f"data: blend weights {list(weights)} repeat only after {self.period} samples (at most {_MAX_PERIOD}); "
                f"round them, for example to {_rounded(weights)}"
            )
        self._counts = np.array(shares, np.int64)  # samples of each set in a period
        self._numbers = _earliest_deadline_first(shares)
        self._ranks = np.empty(self.period, np.int64)  # how often the same set came before in the period
        for number, count in enumerate(self._counts):
            self._ranks[self._numbers == number] = np.arange(count)

    def locate(self, indices: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the number of each index's set, and its index within that set."""
        periods, turns = np.divmod(indices, self.period)
        numbers = self._numbers[turns]
        return numbers, periods * self._counts[numbers] + self._ranks[turns]

    def position_of(self, number: int, set_indices: Int64Array) -> Int64Array:
        """Return the indices at which a set's samples come: the inverse of ``locate``."""
        periods, ranks = np.divmod(set_indices, self._counts[number])
        return periods * self.period + np.flatnonzero(self._numbers == number)[ranks]


def _integer_shares(weights: Sequence[float]) -> list[int]:
    fractions = [Fraction(str(weight)) for weight in weights]  # str: 0.1 is a tenth, as written
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def _rounded(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [max(round(weight / total, 5), 0.00001) for weight in weights]


def _earliest_deadline_first(counts: Sequence[int]) -> Int64Array:
    """Schedule one period such that no set is ever a whole sample ahead or behind.

    Sample j of a set with c of P turns may come from turn floor(j P / c) on and must come before turn
    ceil((j + 1) P / c). Taking the earliest deadline first always meets these windows (Tijdeman 1980, "The chairman
    assignment problem"; Baruah et al. 1996, "Proportionate progress").
    """
    period = sum(counts)
    numbers = np.empty(period, np.int64)
    taken = [0] * len(counts)
    waiting = [(0, number) for number in range(len(counts))]  # by the turn from which the next sample may come
    ready: list[tuple[int, int]] = []  # by deadline
    for turn in range(period):
        while waiting and waiting[0][0] <= turn:
            _, number = heapq.heappop(waiting)
            deadline = -(-(taken[number] + 1) * period // counts[number])
            heapq.heappush(ready, (deadline, number))
        _, number = heapq.heappop(ready)
        numbers[turn] = number
        taken[number] += 1
        heapq.heappush(waiting, (taken[number] * period // counts[number], number))
    return numbers

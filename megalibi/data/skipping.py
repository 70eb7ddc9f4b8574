"""The order of the training data without some of its samples: those after them move up."""

from __future__ import annotations

import numpy as np

from megalibi.config.sample_ranges import SampleRanges
from megalibi.data.schedule import Int64Array


class KeptSamples:
    """The samples that are kept, in their order.

    Args:
        left_out: The numbers of the samples that are left out: their places in the order of the data.
    """

    def __init__(self, left_out: SampleRanges) -> None:
        firsts_R, lasts_R = np.array(left_out.ranges, np.int64).reshape(-1, 2).T
        self._sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(lasts_R - firsts_R + 1)])
        self._first_moved_R = firsts_R - self._sums[:-1]  # the first position that each range moves

    def numbers_at(self, positions_N: Int64Array) -> Int64Array:
        """Return the numbers of the samples at positions, which count the kept samples alone."""
        ranges_before_N = np.searchsorted(self._first_moved_R, positions_N, side="right")
        return positions_N + self._sums[ranges_before_N]

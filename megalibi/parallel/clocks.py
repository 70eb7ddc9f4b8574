"""Whether the hosts' clocks agree. A run trusts none, but whoever reads its logs and the times of its files does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from megalibi.log import get_logger
from megalibi.parallel.agreement import gather_objects
from megalibi.parallel.groups import Group

SKEW_SECONDS = 5.0
"""By how much the clock of a host may differ from rank 0's before it is said."""
_LOGGER = get_logger(__name__)


def compare_clocks(world: Group, hosts: Sequence[str], read_clock: Callable[[], float] = time.time) -> None:
    """Let rank 0 warn of the host whose clock differs most from its own; every rank calls it.

    Args:
        world: All ranks.
        hosts: The host of each rank.
        read_clock: Returns the time by this host's clock, in seconds.
    """
    if len(set(hosts)) == 1:
        return
    gather_objects(None, world)  # so that the ranks come to the next one together
    began = read_clock()
    gather_objects(None, world)
    spans = gather_objects((began, read_clock()), world)
    skews = [find_skew(span, spans[0]) for span in spans]
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    if world.rank == 0 and abs(skews[worst]) >= SKEW_SECONDS:
        off = {host for host, skew in zip(hosts, skews, strict=True) if abs(skew) >= SKEW_SECONDS}
        _LOGGER.warning(
            "the clock of %s is at least %d s %s that of %s%s: the run is none the worse, but times in logs and of "
            "files do not fit together; set the hosts' clocks by one time server",
            hosts[worst], math.floor(abs(skews[worst])), "ahead of" if skews[worst] > 0 else "behind", hosts[0],
            f", and {len(off) - 1} more differ by {SKEW_SECONDS:.0f} s or more" if len(off) > 1 else "",
        )  # fmt: skip


def find_skew(span: tuple[float, float], span_ref: tuple[float, float]) -> float:
    """Return how far one clock is ahead of another at the least, in seconds; below 0 if it is behind.

    No rank leaves a collective before the last one has entered it: at one instant all are inside. So spans of clocks
    that agree overlap, however long a busy host took.

    Args:
        span: When a rank entered a collective and left it, by its own clock.
        span_ref: The same of the rank with which it is compared.
    """
    return max(0.0, span[0] - span_ref[1]) or min(0.0, span[1] - span_ref[0])

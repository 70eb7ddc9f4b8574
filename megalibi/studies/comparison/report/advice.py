"""What the command says in the end of speeds that decide nothing: which they are, by how much, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megalibi.studies.comparison.disturbance import MIN_TURNS, find_slow_turns
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import Variant


def advise(speeds: Mapping[Variant, Speed], command: str) -> list[str]:
    """Return the lines to print; none if every speed can be judged.

    Args:
        speeds: What part one has measured.
        command: The command line that was given.
    """
    few = [speed for speed in speeds.values() if len(speed.turn_medians) < MIN_TURNS]
    slow = {variant: find_slow_turns(speed.turn_medians) for variant, speed in speeds.items()}
    lines = []
    if few:
        lines.append(f"too few turns: {len(few)} of {len(speeds)} speeds have fewer than {MIN_TURNS}")
    for variant, numbers in slow.items():
        if numbers:
            speed = speeds[variant]
            turns = ", ".join(f"{n}: {seconds:.3g} s" for n, seconds in sorted(speed.turn_medians.items()))
            where = f"{variant.model}, {variant.attention} attention"
            lines.append(f"disturbed: {where}: {speed.turn_spread:.1%} between its turns ({turns})")
    if lines:
        again = sorted({number for numbers in slow.values() for number in numbers})
        words = [
            re.sub(r" --(part|again)[ =]\S+", "", command),
            "--part speed",
            f"--again {','.join(map(str, again))}" if again else "",
        ]
        words.append(f"study.turns={MIN_TURNS}" if few else "")
        what = "measures these turns alone, with every model" if again else "measures the missing turns alone"
        lines.append(f"on a quiet machine this {what}: {' '.join(filter(None, words))}")
    return lines

"""What the command says in the end of speeds that decide nothing: which they are, by how much, and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from megalibi.studies.comparison.disturbance import MIN_TURNS, describe_disturbances, find_disturbed_turns
from megalibi.studies.comparison.speed import Speed
from megalibi.studies.comparison.study import Variant


def advise(speeds: Mapping[Variant, Speed], command: str) -> list[str]:
    """Return the lines to print; none if every speed can be judged.

    Args:
        speeds: What part one has measured.
        command: The command line that was given.
    """
    few = [speed for speed in speeds.values() if len(speed.turn_medians) < MIN_TURNS]
    lines, again = [], set[int]()
    if few:
        lines.append(f"too few turns: {len(few)} of {len(speeds)} speeds have fewer than {MIN_TURNS}")
    for variant, speed in speeds.items():
        found = describe_disturbances(speed.turn_medians, speed.other_busy_cores)
        if found:
            turns = ", ".join(f"{n}: {seconds:.3g} s" for n, seconds in sorted(speed.turn_medians.items()))
            lines.append(f"disturbed: {variant.model}, {variant.attention} attention: {', '.join(found)} ({turns})")
            again |= set(find_disturbed_turns(speed.turn_medians, speed.other_busy_cores))
    if lines:
        numbers = ",".join(map(str, sorted(again)))
        words = [drop_options(command, "--part", "--again"), "--part speed"]
        words += [f"--again {numbers}"] * bool(again) + [f"study.turns={MIN_TURNS}"] * bool(few)
        what = ["the turns that are missing"] * bool(few)
        what += [f"turn{'s' * (len(again) > 1)} {numbers} of every model again"] * bool(again)
        lines.append(f"on a quiet machine this measures {' and '.join(what)}: {' '.join(words)}")
    if again:
        lines.append("turns that are chosen for what they measured are counted on the page, beside what they decide")
    return lines


def drop_options(command: str, *options: str) -> str:
    """Return a command line without some options and their values.

    Args:
        command: The command line, as one would type it.
        options: The options, each of which takes one value.
    """
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return shlex.join(kept)

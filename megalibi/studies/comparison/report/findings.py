"""Whether the comparison came out as the paper's did: each statement by a stated rule, from the numbers.

What rests on a speed is not decided where that speed was disturbed or has too few turns (disturbance.py). That ALiBi
is earlier is not decided where it would be as well if the updates of both models took equally long: then it learns
better, which says nothing of speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from megalibi.studies.comparison.curves import mean_speedup
from megalibi.studies.comparison.results import EqualTime, Pair, Results, format_percent, format_updates
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, ComparedModel
from megalibi.studies.finding import EXPLODED, FLAT, Finding
from megalibi.studies.paper import get_quote, get_table, memory_saving, update_rate_gain

SAME_MEMORY = 0.01
"""Memories count as the same within this share: the paper's ALiBi takes 0 to 0.7% more (sections 1 and 3)."""
SAME_TIME = 0.03
"""Times count as the same within this share."""
SAME_PERPLEXITY = 0.02
"""Perplexities count as the same within this share: in Table 12 those of the main pair are 1% apart."""
AS_FAST = "with updates of equal time too: that ALiBi learns better says nothing of speed"
"""Why it is not decided that ALiBi is earlier, after by how much it would be."""


def judge_comparison(results: Results) -> list[Finding]:
    """Judge each statement of the paper on its main pair; a statement about something not measured is left out.

    Args:
        results: The results of a comparison.
    """
    pair = results.study.pairs()[-1]
    findings: list[Finding] = []
    for attention in ATTENTIONS:
        findings += _judge_speed(results, pair, attention)
        findings += _judge_equal_lengths(results, attention)
        findings += _judge_curves(results, pair, attention)
    return [*findings, *_judge_equal_updates(results, pair), *_judge_extrapolation(results)]


def _paper_pair(number: int, column: str) -> str:
    table = get_table(number)
    ours = table.row(method=ALIBI, train_length=1024)[column]
    return f"{ours} against {table.row(method=SINUSOIDAL, train_length=2048)[column]}"


def _paper_rise(method: str) -> str:
    row = get_table(12).row(method=method, train_length=512)
    return f"{row['512']} at 512, {row['2048']} at 2,048 (Table 12)"


def _judge_speed(results: Results, pair: Pair, attention: str) -> Iterator[Finding]:
    gain, saving = results.rate_gain(*pair, attention), results.memory_saving(*pair, attention)
    if gain is not None:
        finding = Finding(
            expected=f"ALiBi at half the length makes more updates an hour: {update_rate_gain():.1%} (Table 11)",
            rule="the lower quartile of the gain, turn by turn, is above 0",
            measured=f"{attention} attention: {gain.median:+.1%} (quartiles {gain.low:+.1%} to {gain.high:+.1%})",
            holds=gain.low > 0.0,
        )
        yield _weigh(finding, results, pair, attention)
    if saving is not None:
        yield Finding(
            expected=f"and takes less memory: {memory_saving():.1%}, {_paper_pair(11, 'memory_gb')} GB (Table 11)",
            rule=f"the allocator's peak is lower by more than {SAME_MEMORY:.0%}",
            measured=f"{attention} attention: {format_percent(saving)} less",
            holds=saving > SAME_MEMORY,
        )


def _judge_equal_lengths(results: Results, attention: str) -> Iterator[Finding]:
    pairs = [
        (ComparedModel(method=ALIBI, length=n), ComparedModel(method=SINUSOIDAL, length=n))
        for n in results.study.lengths
    ]
    savings = {pair[0].length: results.memory_saving(*pair, attention) for pair in pairs}
    more = {length: -saving for length, saving in savings.items() if saving is not None}
    if more:
        yield Finding(
            expected="at equal length ALiBi and sinusoidal positions take the same memory (Table 12)",
            rule=f"at every length the allocator's peaks are within {SAME_MEMORY:.0%}",
            measured=f"{attention} attention: ALiBi {_by_length(more)}",
            holds=all(abs(value) <= SAME_MEMORY for value in more.values()),
        )
    gains = {pair[0].length: results.rate_gain(*pair, attention) for pair in pairs}
    known = {length: gain for length, gain in gains.items() if gain is not None}
    if known:
        finding = Finding(
            expected="and the same time (Table 12)",
            rule="at every length the quartiles of the gain in updates an hour, turn by turn, are within "
            f"{SAME_TIME:.0%}; no, if at some length both are beyond it on the same side",
            measured=f"{attention} attention: ALiBi {_by_length({n: gain.median for n, gain in known.items()})}",
            holds=all(max(-gain.low, gain.high) <= SAME_TIME for gain in known.values()),
        )
        is_beyond = any(max(gain.low, -gain.high) > SAME_TIME for gain in known.values())
        disagree = [] if finding.holds or is_beyond else [f"some turns are within {SAME_TIME:.0%} and some are not"]
        models = [model for pair in pairs if pair[0].length in known for model in pair]
        yield _weigh(finding, results, models, attention, disagree)


def _by_length(values: dict[int, float]) -> str:
    return ", ".join(f"{format_percent(value, sign='+')} at {length:,}" for length, value in values.items())


def _judge_curves(results: Results, pair: Pair, attention: str) -> Iterator[Finding]:
    levels, equal_time = results.levels(pair, attention), results.equal_time(pair, attention)
    as_fast = results.at_equal_speed(pair)
    if levels:
        without = mean_speedup(as_fast.levels(pair, attention))
        learns = [] if min(without, mean_speedup(levels)) <= 0.0 else [f"earlier by {without:.1%} {AS_FAST}"]
        each = ", ".join(f"{level.speedup:+.1%} at {level.perplexity:.4g}" for level in levels)
        finding = Finding(
            expected=f"ALiBi at half the length reaches a given perplexity {get_quote('time_to_perplexity').value:.0%} "
            "faster on average (section 4.2)",
            rule="on average over five points of training it is faster; not decided where updates of equal time would "
            "show that as well",
            measured=f"{attention} attention: {mean_speedup(levels):+.1%} on average; {each}",
            holds=mean_speedup(levels) > 0.0,
        )
        yield _weigh(finding, results, pair, attention, learns)
    if equal_time and equal_time.alibi and equal_time.sinusoidal:
        ours, theirs = equal_time.alibi, equal_time.sinusoidal
        without = _equal_time_gap(as_fast.equal_time(pair, attention))
        learns = [] if max(without, _equal_time_gap(equal_time)) >= 0.0 else [f"better by {-without:.1%} {AS_FAST}"]
        finding = Finding(
            expected=f"and is better after equal time: {_paper_pair(11, '2048')} (Table 11)",
            rule="its perplexity is lower than the sinusoidal model's, both when the first of the two is done; not "
            "decided where updates of equal time would show that as well",
            measured=f"{attention} attention, {equal_time.hours:.3g} hours: {ours.perplexity:.2f} after "
            f"{format_updates(ours.updates)} updates, {theirs.perplexity:.2f} after {format_updates(theirs.updates)}",
            holds=ours.perplexity < theirs.perplexity,
        )
        yield _weigh(finding, results, pair, attention, learns)


def _equal_time_gap(equal: EqualTime | None) -> float:
    """Return by what share ALiBi's perplexity is above the sinusoidal model's when the first of the two is done."""
    if equal is None or equal.alibi is None or equal.sinusoidal is None:
        return 0.0
    return equal.alibi.perplexity / equal.sinusoidal.perplexity - 1.0


def _weigh(
    finding: Finding, results: Results, models: Sequence[ComparedModel], attention: str, doubts: Sequence[str] = ()
) -> Finding:
    """Return a finding that rests on speeds: not decided if there is a reason for doubt, and with the turns replaced.

    Args:
        finding: The finding, as the numbers have it.
        results: The results of the comparison.
        models: The models on whose speeds it rests.
        attention: Their kind of attention.
        doubts: Reasons for doubt besides disturbed speeds, in words.
    """
    reason = "; ".join([*_find_disturbed(results, models, attention), *doubts])
    speeds = [speed for model in models if (speed := results.find_speed(model, attention))]
    replaced = sum(speed.turns_replaced for speed in speeds)
    measured = f"{finding.measured}; {format_replaced(replaced)}" if replaced else finding.measured
    return dataclasses.replace(finding, holds=None if reason else finding.holds, reason=reason, measured=measured)


def format_replaced(turns: int) -> str:
    """Return how many turns were measured again, as in "2 turns measured anew"."""
    return f"{turns} turn{'s' if turns > 1 else ''} measured anew"


def _find_disturbed(results: Results, models: Sequence[ComparedModel], attention: str) -> list[str]:
    """Return why nothing can be decided by the speeds of some models: each reason with the models that have it."""
    by_reason: dict[str, list[str]] = {}
    for model in models:
        speed = results.find_speed(model, attention)
        if speed is not None and speed.disturbance:
            by_reason.setdefault(speed.disturbance, []).append(str(model))
    every = len(models) if len(models) > 2 else 0
    return [
        f"{'all models' if len(names) == every else ' and '.join(names)}: {reason}"
        for reason, names in by_reason.items()
    ]


def _judge_equal_updates(results: Results, pair: Pair) -> Iterator[Finding]:
    length = pair[1].length
    ours, theirs = (_final(results, model, length) for model in pair)
    if ours is not None and theirs is not None:
        gap = ours / theirs - 1.0
        yield Finding(
            expected=f"after equal updates the two are about as good: {_paper_pair(12, '2048')} (Table 12)",
            rule=f"perplexities at {length:,} are within {SAME_PERPLEXITY:.0%}",
            measured=f"{ours:.2f} with {pair[0]}, {theirs:.2f} with {pair[1]}: {gap:+.1%}, one training each",
            holds=abs(gap) <= SAME_PERPLEXITY,
        )


def _judge_extrapolation(results: Results) -> Iterator[Finding]:
    first, last = results.study.lengths[0], results.study.lengths[-1]
    sinusoidal, alibi = (
        [_final(results, ComparedModel(method=method, length=first), length) for length in (first, last)]
        for method in (SINUSOIDAL, ALIBI)
    )
    if sinusoidal[0] is not None and sinusoidal[1] is not None:
        yield Finding(
            expected=f"sinusoidal positions trained at the shortest length explode past it: {_paper_rise(SINUSOIDAL)}",
            rule=f"at {last:,} the perplexity is {EXPLODED:g} or more times that at {first:,}",
            measured=f"{sinusoidal[0]:.2f} to {sinusoidal[1]:.2f}",
            holds=sinusoidal[1] >= EXPLODED * sinusoidal[0],
        )
    if alibi[0] is not None and alibi[1] is not None:
        yield Finding(
            expected=f"ALiBi trained there does not: {_paper_rise(ALIBI)}",
            rule=f"at {last:,} the perplexity is at most {FLAT:.0%} above that at {first:,}",
            measured=f"{alibi[0]:.2f} to {alibi[1]:.2f}",
            holds=alibi[1] <= (1.0 + FLAT) * alibi[0],
        )


def _final(results: Results, model: ComparedModel, length: int) -> float | None:
    quality = results.qualities.get(model)
    return None if quality is None else quality.final(length)

"""Whether the extrapolation study came out as the paper's did: each statement by a stated rule, from the numbers.

A statement is judged for each seed by itself. It is decided where all seeds agree, and only if the methods are about
equally good at the training length, each with a learning rate inside of its sweep of RATES_MIN or more: otherwise their
curves would tell apart how well they are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from megalibi.studies.extrapolation.spread import mean_curves
from megalibi.studies.extrapolation.study import (
    METHOD_NAMES,
    NONOVERLAPPING,
    SLIDING,
    Curves,
    Perplexities,
    SeedCurves,
)
from megalibi.studies.extrapolation.sweep import Sweep
from megalibi.studies.finding import EXPLODED, FLAT, Finding

CLOSE = 0.05
"""The methods of the paper are about equally good at the training length if the worst of them has a perplexity at most
this share above the best. In the paper's Tables 2 to 4 they lie within 2.1% at 512 tokens, 3.6% at 1,024 and 6.1% at
3,072, where this rule would decide nothing."""
RATES_MIN = 3
"""A sweep of fewer learning rates has none with a lower and a higher one beside it."""
COMPARED = ("sinusoidal", "rotary", "t5_bias", "alibi")
"""The methods of the paper's Figure 4."""


def judge_extrapolation(curves: SeedCurves, train_length: int, sweeps: Mapping[str, Sweep]) -> list[Finding]:
    """Judge each statement of the paper by the curves; a statement whose methods were not measured is left out.

    The first finding says how far the paper's methods lie apart at the training length; if that is more than CLOSE,
    none of the others is decided. With one method of the paper there is nothing to lie apart. Nor is any decided if
    one of these methods may have a better learning rate: its own is at the edge of its sweep, or that has fewer than
    RATES_MIN rates.

    Args:
        curves: Perplexities by seed, protocol and position method.
        train_length: Tokens that the models were trained at: the first length of every curve.
        sweeps: The sweep of each method of the paper that was measured; others do not matter.
    """
    means = mean_curves(curves)
    by_seed = [_judge_curves(of_seed, train_length) for of_seed in curves.values()]
    findings = [
        _agree(of_mean, [f.holds for f in of_seeds])
        for of_mean, *of_seeds in zip(_judge_curves(means, train_length), *by_seed, strict=True)
    ]
    at_start = {m: curve[train_length] for m, curve in means.get(NONOVERLAPPING, {}).items() if m in COMPARED}
    span = [_span(at_start, train_length)] if len(at_start) > 1 else []
    reason = _explain_tuning({method: sweeps[method] for method in at_start})
    if span and not span[0].holds:
        reason = "see the first finding"
    return [*span, *([_undecided(f, reason) for f in findings] if reason else findings)]


def _explain_tuning(sweeps: Mapping[str, Sweep]) -> str:
    """Return why a better learning rate may not have been tried; empty: all are inside of their sweeps."""
    if any(len(sweep.losses) < RATES_MIN for sweep in sweeps.values()):
        return f"fewer than {RATES_MIN} learning rates tried"
    at_edge = [METHOD_NAMES[method] for method, sweep in sweeps.items() if sweep.is_at_edge]
    return f"{', '.join(at_edge)}: learning rate at the edge of the sweep" if at_edge else ""


def _agree(of_mean: Finding, verdicts: Sequence[bool | None]) -> Finding:
    """Return the finding with the verdict of all seeds; its numbers are those of the mean."""
    if len(set(verdicts)) == 1:
        return dataclasses.replace(of_mean, holds=verdicts[0])
    return _undecided(of_mean, f"{sum(map(bool, verdicts))} of {len(verdicts)} seeds say yes")


def _undecided(finding: Finding, reason: str) -> Finding:
    return dataclasses.replace(finding, holds=None, reason=reason)


def _span(at_start: Mapping[str, float], train_length: int) -> Finding:
    span = max(at_start.values()) / min(at_start.values()) - 1.0
    values = ", ".join(f"{METHOD_NAMES[m]} {at_start[m]:.2f}" for m in sorted(at_start, key=lambda m: at_start[m]))
    return Finding(
        expected="at the training length the methods are about equally good",
        rule=f"the highest mean perplexity at the training length is at most {CLOSE:.0%} above the lowest; otherwise "
        "nothing below is decided; nor is it if the learning rate of one of them is at the edge of its sweep, or fewer "
        f"than {RATES_MIN} rates were tried",
        measured=f"{values} at {train_length:,}: {span:.2%} apart",
        holds=max(at_start.values()) <= (1.0 + CLOSE) * min(at_start.values()),
    )


def _judge_curves(curves: Curves, train_length: int) -> list[Finding]:
    shared = [m for m in METHOD_NAMES if len(curves.get(NONOVERLAPPING, {}).get(m, {})) > 1]
    findings = [
        find(curves[NONOVERLAPPING], train_length)
        for needed, find in _NONOVERLAPPING_FINDINGS
        if set(needed) <= set(shared)
    ]
    if len(curves.get(SLIDING, {}).get("alibi", {})) > 1:
        findings.append(_alibi_sliding(curves[SLIDING], train_length))
    return findings


def relative(curve: Perplexities, train_length: int) -> dict[int, float]:
    """Return each perplexity over the one at the training length."""
    return {length: perplexity / curve[train_length] for length, perplexity in curve.items()}


def find_rise(curve: Perplexities, train_length: int) -> int | None:
    """Return the first length at which a curve is more than FLAT above its value at the training length, if any."""
    above = [length for length, ratio in relative(curve, train_length).items() if ratio > 1.0 + FLAT]
    return min(above, default=None)


def _at_end(method: str, curve: Perplexities, train_length: int) -> str:
    longest = max(curve)
    return (
        f"{METHOD_NAMES[method]} {curve[train_length]:.2f} at {train_length:,}, {curve[longest]:.2f} at {longest:,} "
        f"({curve[longest] / curve[train_length]:.3g} x)"
    )


def _sinusoidal(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    curve = curves["sinusoidal"]
    return Finding(
        expected="sinusoidal positions explode past the training length",
        rule=f"at the longest length the perplexity is {EXPLODED:g} or more times that at the training length",
        measured=_at_end("sinusoidal", curve, train_length),
        holds=relative(curve, train_length)[max(curve)] >= EXPLODED,
    )


def _rotary(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    ends = {m: relative(curves[m], train_length)[max(curves[m])] for m in ("rotary", "sinusoidal")}
    return Finding(
        expected="rotary positions degrade, less than sinusoidal ones",
        rule=f"at the longest length the perplexity is more than {FLAT:.0%} above that at the training length, and by "
        "a smaller factor than with sinusoidal positions",
        measured="; ".join(_at_end(m, curves[m], train_length) for m in ends),
        holds=1.0 + FLAT < ends["rotary"] < ends["sinusoidal"],
    )


def _t5_bias(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    rises = {m: find_rise(curves[m], train_length) for m in ("t5_bias", "rotary")}
    t5, rotary = (float("inf") if rise is None else rise for rise in rises.values())
    where = [f"{METHOD_NAMES[m]} {'at no length' if rise is None else f'at {rise:,}'}" for m, rise in rises.items()]
    return Finding(
        expected="the T5 bias extrapolates further than rotary positions before it degrades",
        rule=f"the first length at which its perplexity is more than {FLAT:.0%} above that at the training length is "
        "longer than with rotary positions",
        measured="; ".join(where),
        holds=t5 > rotary,
    )


def _alibi_nonoverlapping(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    curve = curves["alibi"]
    highest = max(relative(curve, train_length).values())
    return Finding(
        expected="ALiBi is flat or falls under nonoverlapping evaluation",
        rule=f"at no length is the perplexity more than {FLAT:.0%} above that at the training length",
        measured=f"{_at_end('alibi', curve, train_length)}; highest {highest - 1.0:+.1%}",
        holds=highest <= 1.0 + FLAT,
    )


def _alibi_best(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    others = {m: curves[m] for m in ("sinusoidal", "rotary", "t5_bias") if m in curves}
    longest = max(curves["alibi"])
    ends = {m: curve[longest] for m, curve in {"alibi": curves["alibi"], **others}.items() if longest in curve}
    return Finding(
        expected="at the longest length ALiBi is the best, then the T5 bias, rotary and sinusoidal positions",
        rule="the perplexities at the longest length are in this order",
        measured=", ".join(f"{METHOD_NAMES[m]} {ends[m]:.2f}" for m in sorted(ends, key=lambda m: ends[m]))
        + f" at {longest:,}",
        holds=sorted(ends, key=lambda m: ends[m])
        == [m for m in ("alibi", "t5_bias", "rotary", "sinusoidal") if m in ends],
    )


def _alibi_sliding(curves: Mapping[str, Perplexities], train_length: int) -> Finding:
    curve = curves["alibi"]
    ratios = relative(curve, train_length)
    low, high = min(ratios.values()) - 1.0, max(ratios.values()) - 1.0
    return Finding(
        expected="ALiBi is flat under sliding evaluation: what falls otherwise is the share of tokens with little "
        "context",
        rule=f"at every length the perplexity is within {FLAT:.0%} of that at the training length",
        measured=f"{_at_end('alibi', curve, train_length)}; from {low:+.1%} to {high:+.1%}",
        holds=max(-low, high) <= FLAT,
    )


_NONOVERLAPPING_FINDINGS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Perplexities], int], Finding]], ...] = (
    (("sinusoidal",), _sinusoidal),
    (("rotary", "sinusoidal"), _rotary),
    (("t5_bias", "rotary"), _t5_bias),
    (("alibi",), _alibi_nonoverlapping),
    (("alibi", "sinusoidal"), _alibi_best),
)
"""The methods that must have been measured, and the function that judges one statement about them."""

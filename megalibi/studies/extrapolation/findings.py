"""Whether the extrapolation study came out as the paper's did: each statement by a stated rule, from the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megalibi.studies.extrapolation.study import METHOD_NAMES, NONOVERLAPPING, SLIDING, Curves, Perplexities
from megalibi.studies.finding import EXPLODED, FLAT, Finding


def judge_extrapolation(curves: Curves, train_length: int) -> list[Finding]:
    """Judge each statement of the paper by the curves; a statement whose methods were not measured is left out.

    Args:
        curves: Perplexities by protocol and position method.
        train_length: Tokens that the models were trained at: the first length of every curve.
    """
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

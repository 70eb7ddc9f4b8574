"""Train short, test long (arXiv:2108.12409, Figure 4): what is trained and scored, and whether it came out as there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megalibi.config import Config
from megalibi.config.model import POSITION_METHODS
from megalibi.errors import ConfigError

NONOVERLAPPING, SLIDING = PROTOCOLS = ("nonoverlapping", "sliding")
METHOD_NAMES = {
    "sinusoidal": "sinusoidal",
    "rotary": "rotary",
    "t5_bias": "T5 bias",
    "alibi": "ALiBi",
    "learned": "learned",
    "none": "none",
}
"""As tables and pictures call them, in their order."""

FLAT = 0.03
"""A curve that stays within this of its value at the training length is flat. The paper calls ALiBi's so under sliding
evaluation, and its Table 15 rises by 1.8% (trained at 512) and by 2.6% (at 1,024)."""
EXPLODED = 2.0
"""A curve that ends at this many times its value at the training length has exploded. In the paper's Table 2
sinusoidal positions are there at twice the training length."""

Perplexities = Mapping[int, float]
"""By evaluation length."""
Curves = Mapping[str, Mapping[str, Perplexities]]
"""Protocol -> method -> perplexities."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolationStudy:
    """The section ``study`` of an extrapolation study."""

    methods: tuple[str, ...]
    """Position methods, each trained once."""
    lengths: tuple[int, ...]
    """Evaluation lengths, rising; the first is the training length."""
    stride: int
    """Tokens between sliding windows."""
    nonoverlapping_tokens: int
    """Tokens of data.valid for nonoverlapping evaluation."""
    sliding_tokens: int
    """Tokens of data.valid for sliding evaluation, which takes length / stride times as long."""
    ranks: int = 1
    """Processes of each training."""

    def __post_init__(self) -> None:
        """Check what one section can know."""
        for method in self.methods:
            if method not in POSITION_METHODS:
                raise ConfigError(f"study.methods: {method} is not allowed: {', '.join(POSITION_METHODS)} are")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"study.methods={list(self.methods)} is not allowed: one or more, each once, are")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"study.lengths={list(self.lengths)} is not allowed: rising whole numbers above 0 are")
        if not 1 <= self.stride <= self.lengths[0]:
            raise ConfigError(
                f"study.stride={self.stride} is not allowed: 1 to {self.lengths[0]}, the first length, is"
            )
        for name in ("nonoverlapping_tokens", "sliding_tokens"):
            if getattr(self, name) <= self.lengths[-1]:
                raise ConfigError(
                    f"study.{name}={getattr(self, name)} is not allowed: more than {self.lengths[-1]}, the longest of "
                    "study.lengths, is"
                )
        if self.ranks < 1:
            raise ConfigError(f"study.ranks={self.ranks} is not allowed: at least 1 is")

    def check_base(self, base: Config) -> None:
        """Check what the section and the run must agree on.

        Raises:
            ConfigError: They do not.
        """
        if self.lengths[0] != base.data.seq_length:
            raise ConfigError(
                f"study.lengths={list(self.lengths)} does not begin with data.seq_length={base.data.seq_length}: the "
                "training length must come first"
            )
        if len(base.data.valid) != 1:
            raise ConfigError(f"data.valid has {len(base.data.valid)} token files: one is needed to evaluate on")

    def lengths_of(self, method: str) -> tuple[int, ...]:
        """Return the lengths at which a method can be evaluated: learned positions end at the training length."""
        return self.lengths[:1] if method == "learned" else self.lengths

    def tokens_of(self, protocol: str) -> int:
        """Return how much of the text a protocol scores."""
        return self.nonoverlapping_tokens if protocol == NONOVERLAPPING else self.sliding_tokens


def method_config(base: Config, method: str) -> Config:
    """Return the run of a method: the study's, in a folder of its own."""
    cap = base.data.seq_length if method == "learned" else 0
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, position_method=method, max_position_embeddings=cap),
        train=dataclasses.replace(base.train, output_dir=str(Path(base.train.output_dir) / method)),
    )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the paper found, and whether it came out so here."""

    expected: str
    """What the paper found."""
    rule: str
    """What must hold of the numbers to call it so."""
    measured: str
    """The numbers it was judged by."""
    holds: bool
    """Whether the rule holds."""

    def __str__(self) -> str:
        """Return the line that a tool prints."""
        return f"{'as in the paper' if self.holds else 'NOT as in the paper'}: {self.expected}: {self.measured}"


def judge(curves: Curves, train_length: int) -> list[Finding]:
    """Say for each of the paper's findings whether curves show it; findings whose methods are missing are left out.

    Args:
        curves: Perplexities by protocol and method.
        train_length: Where each curve's own level is; it is the first length of every curve.
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
    """Return the first length at which a curve is FLAT above its value at the training length; None: at none."""
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
"""The methods that a finding is about, and how it is judged."""

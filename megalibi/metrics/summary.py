"""The numbers one quotes of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalibi.metrics.records import RunMetrics, StepRecord, ValidationRecord

# One batch is too noisy: the final training loss is the mean over the last twentieth of the run, at most 100 steps.
_FINAL_FRACTION = 20
_FINAL_STEPS_MAX = 100


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The median of a measurement and its interquartile range."""

    low: float
    """The first quartile of the values."""
    median: float
    """The median of the values."""
    high: float
    """The third quartile of the values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(low=float(low), median=float(median), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers one quotes of a run."""

    steps: int
    """The number of the last recorded step."""
    tokens: int
    """Training tokens consumed until the last step."""
    loss: float
    """Mean training loss of the last `loss_steps` steps, in nats per token."""
    loss_steps: int
    """Number of steps that `loss` is the mean of."""
    validation: ValidationRecord | None
    """The last validation; None if there was none."""
    tokens_per_second: Quartiles
    """Tokens per second over all recorded steps, all ranks together."""
    model_tflops_per_second: Quartiles
    """Model TFLOP per second over all recorded steps; attention counts every query-key pair."""
    model_tflops_per_second_causal: Quartiles
    """Model TFLOP per second over all recorded steps; attention counts the pairs that the causal mask leaves."""
    memory_peak_bytes: int
    """Highest memory that rank 0 used in the run, in bytes."""
    train_seconds: float
    """Sum of the wall times of the steps, in seconds, without validation and saving."""
    skipped_steps: int
    """Number of steps that left the weights as they were, because the loss or the gradient was not finite."""
    rollbacks: int
    """Number of loss spikes that took the run back to a checkpoint."""
    straggler_ratio: Quartiles | None
    """Straggler ratio over all comparisons of the ranks; None if there was none, as on one rank."""
    slowest_rank: int | None
    """The rank that was the slowest most often; None if the ranks were not compared."""


def summarize(metrics: RunMetrics) -> Summary | None:
    """Return the summary of a run's metrics; None if no step is recorded."""
    steps = metrics.steps
    if not steps:
        return None
    ratios = [record.straggler_ratio for record in steps if record.straggler_ratio is not None]
    slowest = Counter(record.slowest_rank for record in steps if record.slowest_rank is not None)
    # A step that was skipped says nothing of the model, unless the run ended with it.
    counted = [r for r in steps if math.isfinite(r.loss) or not r.skipped or r is steps[-1]]
    final: Sequence[StepRecord] = counted[-max(1, min(len(steps) // _FINAL_FRACTION, _FINAL_STEPS_MAX)) :]
    return Summary(
        steps=steps[-1].step,
        tokens=steps[-1].tokens,
        loss=sum(record.loss for record in final) / len(final),
        loss_steps=len(final),
        validation=metrics.validations[-1] if metrics.validations else None,
        tokens_per_second=Quartiles.of([record.tokens_per_second for record in steps]),
        model_tflops_per_second=Quartiles.of([record.model_tflops_per_second for record in steps]),
        model_tflops_per_second_causal=Quartiles.of([record.model_tflops_per_second_causal for record in steps]),
        memory_peak_bytes=max(record.memory_peak_bytes for record in steps),
        train_seconds=sum(record.step_seconds for record in steps),
        skipped_steps=sum(bool(record.skipped) for record in steps),
        rollbacks=len(metrics.rollbacks),
        straggler_ratio=Quartiles.of(ratios) if ratios else None,
        slowest_rank=slowest.most_common(1)[0][0] if slowest else None,
    )

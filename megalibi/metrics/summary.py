"""The numbers one quotes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalibi.metrics.records import RunMetrics, StepRecord, ValidationRecord

# The final training loss is a mean, over the last twentieth of the run but 100 steps at most: one batch is too noisy.
_FINAL_FRACTION = 20
_FINAL_STEPS_MAX = 100


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The median of a measurement and its interquartile range."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(low=float(low), median=float(median), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers one quotes of a run."""

    steps: int
    """Last step."""
    tokens: int
    """Training tokens consumed."""
    loss: float
    """Mean training loss of the last `loss_steps` steps."""
    loss_steps: int
    """How many steps that mean is of."""
    validation: ValidationRecord | None
    """The last validation, if there was any."""
    tokens_per_second: Quartiles
    """Over all recorded steps."""
    model_tflops_per_second: Quartiles
    """Over all recorded steps, attention counted in full."""
    model_tflops_per_second_causal: Quartiles
    """Over all recorded steps, attention counted causally."""
    memory_peak_bytes: int
    """Highest over the run."""
    train_seconds: float
    """Sum of the steps' wall times; validation and saving are not in it."""
    skipped_steps: int
    """Steps whose gradients overflowed in fp16."""


def summarize(metrics: RunMetrics) -> Summary | None:
    """Sum a run's metrics up; None if no step is recorded."""
    steps = metrics.steps
    if not steps:
        return None
    final: Sequence[StepRecord] = steps[-max(1, min(len(steps) // _FINAL_FRACTION, _FINAL_STEPS_MAX)) :]
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
    )

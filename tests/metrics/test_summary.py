from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from megalibi.metrics.records import RunMetrics, StepRecord, read_metrics
from megalibi.metrics.summary import Quartiles, summarize

MakeStep = Callable[..., StepRecord]


def test_the_summary_holds_what_one_quotes(write_run: Callable[..., Path]) -> None:
    metrics = read_metrics(write_run("quoted"))
    summary = summarize(metrics)
    assert summary is not None
    assert (summary.steps, summary.tokens, summary.loss_steps) == (40, 40 * 512, 2)
    assert summary.loss == (metrics.steps[-1].loss + metrics.steps[-2].loss) / 2
    assert summary.validation == metrics.validations[-1]
    assert summary.train_seconds == 20.0
    assert summary.memory_peak_bytes == 1_300_000_000
    assert summary.skipped_steps == 0


def test_the_spread_is_interquartile_and_one_slow_step_does_not_move_it(make_step: MakeStep) -> None:
    speeds = [1.0, 100.0, 101.0, 102.0, 103.0]
    steps = tuple(make_step(i, tokens_per_second=speed, skipped=i == 1) for i, speed in enumerate(speeds, start=1))
    summary = summarize(RunMetrics(steps=steps, validations=()))
    assert summary is not None
    assert summary.tokens_per_second == Quartiles(low=100.0, median=101.0, high=102.0)
    assert summary.skipped_steps == 1
    assert summary.loss_steps == 1
    assert (summary.straggler_ratio, summary.slowest_rank) == (None, None)


def test_the_slowest_rank_is_the_one_that_was_so_most_often(make_step: MakeStep) -> None:
    found = [(1.0, 3), (1.5, 1), (2.0, 3), (3.0, 0), (None, None)]
    steps = tuple(
        make_step(i, straggler_ratio=ratio, slowest_rank=rank) for i, (ratio, rank) in enumerate(found, start=1)
    )
    summary = summarize(RunMetrics(steps=steps, validations=()))
    assert summary is not None
    assert summary.straggler_ratio == Quartiles(low=1.375, median=1.75, high=2.25)
    assert summary.slowest_rank == 3


def test_no_steps_no_summary_and_a_diverged_run_says_so(make_step: MakeStep) -> None:
    assert summarize(RunMetrics(steps=(), validations=())) is None
    summary = summarize(RunMetrics(steps=(make_step(1, loss=math.nan),), validations=()))
    assert summary is not None
    assert math.isnan(summary.loss)


def test_a_step_that_was_skipped_is_no_loss_of_the_model(make_step: MakeStep) -> None:
    steps = [make_step(step, loss=1.0) for step in range(1, 61)]
    steps[58] = make_step(59, loss=math.nan, skipped=True)
    summary = summarize(RunMetrics(steps=tuple(steps), validations=()))
    assert summary is not None
    assert (summary.loss, summary.loss_steps, summary.skipped_steps) == (1.0, 3, 1)

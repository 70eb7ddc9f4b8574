from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megalibi.errors import ConfigError
from megalibi.evaluate.result import read_evaluation
from megalibi.metrics.records import RunMetrics, StepRecord
from megalibi.metrics.summary import Quartiles, summarize
from megalibi.report.run import read_run

MakeStep = Callable[..., StepRecord]


def test_a_folder_becomes_a_run(write_run: Callable[..., Path]) -> None:
    run = read_run(write_run("quickstart"))
    assert run.name == "quickstart"
    assert run.config["parallel"] == {"tensor_parallel_size": 2}
    assert (len(run.metrics.steps), len(run.metrics.validations)) == (40, 2)
    (evaluation,) = run.evaluations
    assert [result.length for result in evaluation.results] == [64, 128]
    assert evaluation.train_seq_length == 64


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds neither config\.yaml nor metrics\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "model: [1"),
        ("config.yaml", "- a\n- b\n"),
        ("run_info.json", "{"),
        ("evaluation.json", "[]"),
        ("evaluation-sliding.json", '{"step": 1, "results": []}'),
        ("evaluation.json", '{"step": 1, "train_seq_length": 8, "protocol": "sliding", "results": [{"length": 8}]}'),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    write_run: Callable[..., Path], file: str, content: str
) -> None:
    folder = write_run("broken")
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=file) as raised:
        read_run(folder)
    assert "\n" not in str(raised.value)


def test_the_summary_holds_what_one_quotes(write_run: Callable[..., Path]) -> None:
    metrics = read_run(write_run("quoted")).metrics
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


def test_no_steps_no_summary_and_a_diverged_run_says_so(make_step: MakeStep) -> None:
    assert summarize(RunMetrics(steps=(), validations=())) is None
    summary = summarize(RunMetrics(steps=(make_step(1, loss=math.nan),), validations=()))
    assert summary is not None
    assert math.isnan(summary.loss)


def test_an_evaluation_may_lack_what_its_machine_could_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-long.json"
    path.write_text(
        '{"step": 1, "train_seq_length": 8, "protocol": "sliding", "stride": 4,'
        ' "results": [{"length": 8, "loss": 1.0, "perplexity": 2.718, "tokens": 64}]}'
    )
    evaluation = read_evaluation(path)
    assert (evaluation.name, evaluation.stride) == ("evaluation-long", 4)
    assert evaluation.results[0].memory_bytes is None

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.in_process import load_tool
from tests.support.jobs import ScriptJob, torchrun_environment

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_pace.py"
SMALL = ["--hidden-size", "64", "--num-layers", "1", "--seq-length", "8", "--pairs", "12"]


def test_the_interval_holds_what_was_added_to_steps_that_vary_more_than_that() -> None:
    summarize_pairs = load_tool(TOOL).summarize_pairs
    rng = np.random.default_rng(1)
    busy = rng.exponential(0.01, size=(1500, 2))
    summary = summarize_pairs(0.1 + busy + [0.0, 0.002])
    low, high = summary["overhead_interval_95"]
    share = 0.002 / (0.1 + 0.01 * np.log(2))
    assert low < share < high < low + 0.02
    assert summary["overhead"] == pytest.approx(share, abs=0.005)
    assert summary["step_seconds"] == pytest.approx(0.1 + 0.01 * np.log(2), rel=0.01)


def test_it_measures_two_real_ranks(tmp_path: Path) -> None:
    output = tmp_path / "pace.json"
    job = ScriptJob(TOOL, [[*SMALL, "--output", str(output)]] * 2, tmp_path, torchrun_environment(2))
    job.succeed()
    record = json.loads(output.read_text())
    assert (record["ranks"], record["pairs"]) == (2, 12)
    for clock in ("wall_clock", "processor_of_rank_0"):
        low, high = record[clock]["overhead_interval_95"]
        assert low <= record[clock]["overhead"] <= high
        assert record[clock]["step_seconds"] > 0
    calls = record["calls_alone"]
    assert calls["waits_in_a_step"] == 3 + 2  # the embedding's sum and two of each layer; two of the cross entropy
    step = calls["seconds_in_a_step"] / calls["share_of_a_step"]
    assert step == pytest.approx(record["wall_clock"]["step_seconds"])
    assert 1e-6 * calls["waits_in_a_step"] < calls["seconds_in_a_step"] < 0.1 * step

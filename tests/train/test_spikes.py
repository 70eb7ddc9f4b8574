from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from megalibi.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from megalibi.config import Config
from megalibi.engine.step import StepResult
from megalibi.train.spikes import LossSpikes
from tests.support.checkpoints import assert_whole
from tests.support.jobs import Job, exact_records, read_records, run_job
from tests.support.poison import BATCH, write_job_with_bad_text
from tests.support.ranks import run_on_ranks
from tests.support.runs import build, make_config
from tests.support.saving import save, take_steps
from tests.train.test_nonfinite import make_job

FIRST_LEFT_OUT = "48-55"
"""The samples of batches 12 and 13: the checkpoint of step 12 is the newest before the first poisoned batch."""
SECOND_LEFT_OUT = "72-79"
"""Those of batches 18 and 19, which are of steps 17 and 18 by then; the checkpoint is that of step 16."""


def steps_of(run: Path) -> list[dict[str, object]]:
    return [record for record in exact_records(run) if "loss" in record]


def test_a_poisoned_stretch_takes_the_run_back_and_is_left_out(tmp_path: Path) -> None:
    """What comes of it is digit for digit a run that was told what to leave out; a second stretch is one too many."""
    config = write_job_with_bad_text(tmp_path)
    run, straight = tmp_path / "run", tmp_path / "straight"
    job = Job(config, world_size=2)
    assert job.wait() == [2, 2]
    log = " ".join(job.read_log(0).split())
    spike = r"step 14 has loss \d\.\d{4}, a spike above \d\.\d{4}"
    assert re.search(rf"{spike}: goes back to step_00000012 and leaves out the samples {FIRST_LEFT_OUT}", log)
    (error,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert re.search(r"step 18 has loss .*, and there is train.max_rollbacks=1: the run stops; ", error)
    assert f"'data.skip=[{FIRST_LEFT_OUT},{SECOND_LEFT_OUT}]' leaves out the samples since step 16 at the" in error
    (rollback,) = [record for record in read_records(run) if "rolled_back_from" in record]
    dropped = [json.loads(line) for line in (run / "metrics.dropped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in dropped] == [13, 14]
    assert rollback == {
        "step": 12,
        "rolled_back_from": 14,
        "spike_loss": dropped[1]["loss"],
        "left_out": FIRST_LEFT_OUT,
    }
    assert dropped[1]["loss"] > 2 * dropped[0]["loss"]
    saved = list_checkpoints(run / "checkpoints")
    assert [assert_whole(path) for path in saved] == [4, 8, 12, 16]
    assert [len(Checkpoint.open(path).manifest.rollbacks) for path in saved] == [0, 0, 1, 1]

    # The same command goes on, remembers what was left out, and goes back once more.
    job = run_job(config, "train.max_rollbacks=2", world_size=2)
    assert f"goes back to step_00000016 and leaves out the samples {SECOND_LEFT_OUT}" in " ".join(
        job.read_log(0).split()
    )
    told = f"data.skip=[{FIRST_LEFT_OUT},{SECOND_LEFT_OUT}]"
    run_job(config, "train.on_spike=none", told, f"train.output_dir={straight}", world_size=2)
    assert steps_of(run) == steps_of(straight)
    assert [record["step"] for record in steps_of(run)] == list(range(1, 21))
    assert [record["samples"] for record in steps_of(run)] == [BATCH * step for step in range(1, 21)]

    # A run that began from another one's checkpoint, and has none of its own, goes back to that.
    begin, branch = saved[1], tmp_path / "branch"
    job = run_job(
        config,
        f"checkpoint.resume={begin}",
        f"train.output_dir={branch}",
        "checkpoint.every_steps=0",
        "train.spike_window=4",
        "train.max_rollbacks=2",
        "train.steps=14",
        world_size=2,
    )
    for left_out in ("32-55", "56-79"):  # then batch 19 is that of step 14
        assert f"goes back to step_00000008 and leaves out the samples {left_out}" in " ".join(job.read_log(0).split())
    assert [assert_whole(path) for path in list_checkpoints(branch / "checkpoints")] == [8, 14]
    assert [record["step"] for record in steps_of(branch)] == list(range(9, 15))


def go_back_in_process(config: Config) -> tuple[list[StepResult], list[StepResult]]:
    """Take five steps, go back to the second in the same engine, and take three again."""
    engine, groups = build(config)
    take_steps(config, engine, groups, 0, 2)
    checkpoint = save(config, engine, groups, config.train.output_dir, 2)
    straight = take_steps(config, engine, groups, 2, 5)
    load_checkpoint(engine, checkpoint, groups)
    again = take_steps(config, engine, groups, 2, 5)
    engine.destroy()
    return straight, again


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_an_engine_that_goes_back_is_the_one_that_was_saved(
    prefix: str, tmp_path: Path, stage: int, precision: str
) -> None:
    config = make_config(
        prefix,
        zero={"stage": stage},
        train={"precision": precision, "output_dir": str(tmp_path)},
        model={"dropout": 0.1},
    )
    for straight, again in run_on_ranks(2, go_back_in_process, config):
        assert again == straight


def test_a_spike_is_so_many_deviations_above_the_mean_of_the_last_losses(prefix: str) -> None:
    spikes = LossSpikes(make_job(prefix, on_spike="rollback", spike_window=4, spike_deviations=3.0), [(1, math.nan)])
    for step, loss in enumerate((9.0, 4.0, 2.0, 4.0), start=2):
        assert spikes.find_limit() is None
        assert not spikes.any_spike(step, loss)
    assert not spikes.is_spike(6, math.nan)
    assert not spikes.is_spike(7, 2.0)
    assert spikes.find_limit() == pytest.approx(3.0 + 3.0 * 1.0)
    assert spikes.any_spike(8, 6.1)
    assert spikes.find_limit() == pytest.approx(6.0)  # a spike is not one of the losses
    assert not spikes.any_spike(8, 5.9)
    spikes.go_back(7)
    assert spikes.find_limit() == pytest.approx(6.0)
    spikes.go_back(4)
    assert spikes.find_limit() is None


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    config = write_job_with_bad_text(tmp_path)
    job = Job(config, "checkpoint.every_steps=0")
    assert job.wait() == [2]
    (error,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert ", and there is no checkpoint to go back to: the run stops; 'data.skip=[0-55]' leaves out" in error

from __future__ import annotations

import json
import logging
import math
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalibi.checkpoint import list_checkpoints
from megalibi.config import Config, config_from_dict, config_to_dict, derive
from megalibi.config.sample_ranges import SampleRanges
from megalibi.engine.step import StepResult
from megalibi.errors import DivergenceError
from megalibi.parallel import single_process_groups
from megalibi.train.job import Job as TrainJob
from megalibi.train.job import RunData, open_split
from megalibi.train.nonfinite import NonFiniteSteps, check_finite
from tests.support.checkpoints import assert_whole
from tests.support.jobs import Job, exact_records, read_records, run_job
from tests.support.poison import BAD_STEP, write_job_with_a_bad_embedding
from tests.support.runs import identify, make_config

STEPS = 6
GOOD = StepResult(loss=1.0, grad_norm=1.0, tokens=1, sample_hash=0, loss_scale=1.0, skipped=False)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run that begins with that embedding."""
    return write_job_with_a_bad_embedding(tmp_path_factory.mktemp("poisoned"), STEPS)


def error_of(job: Job, code: int) -> str:
    assert set(job.wait()) == {code}, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


def named_samples(message: str) -> set[int]:
    places = re.findall(rf"rank 1 on {socket.gethostname()} \(micro batch (\d): sample (\d+)\)", message)
    assert places
    assert "rank 0 on" not in message
    samples = {int(sample) for _, sample in places}
    assert samples <= {4 * BAD_STEP + 1, 4 * BAD_STEP + 3}  # rank 1's of the micro batches of one sample
    assert all((int(sample) - 4 * BAD_STEP) // 2 == int(index) for index, sample in places)
    return samples


def test_a_batch_is_skipped_by_all_ranks_and_the_run_goes_on(poisoned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = run_job(poisoned, "train.on_nonfinite=skip", f"train.output_dir={run}", world_size=2)
    records = read_records(run)
    assert [record["step"] for record in records if record.get("skipped")] == [BAD_STEP + 1]
    assert [record["step"] for record in records if record["loss"] == "NaN"] == [BAD_STEP + 1]
    assert [record["samples"] for record in records] == [4 * step for step in range(1, STEPS + 1)]
    line = " ".join(job.read_log(0).split())
    said = f"step {BAD_STEP + 1} has loss nan and gradient norm inf: no rank changes its weights, and the run goes on"
    assert said in line
    assert "(1 of train.max_consecutive_skips=3 in a row)" in line
    assert "'data.skip=[12-15]' leaves the batch out" in line
    named_samples(line)
    # Its other samples have a finite loss: the weights are good, and are saved.
    assert [assert_whole(path) for path in list_checkpoints(run / "checkpoints")] == [2, 4, 6]


def test_a_stop_keeps_the_checkpoint_and_the_next_start_leaves_the_batch_out(poisoned: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    here = f"train.output_dir={run}"
    error = error_of(Job(poisoned, here, world_size=2), 2)
    named_samples(error)
    assert (
        f"step {BAD_STEP + 1} has loss nan and gradient norm inf: the run has diverged and stops; go back to" in error
    )
    assert [assert_whole(path) for path in list_checkpoints(run / "checkpoints")] == [2]
    mark = json.loads((run / "diverged.json").read_text())
    assert (mark["step"], f"error: {mark['message']}") == (BAD_STEP + 1, error)
    found = re.search(r"'(data\.skip=\[.*?\])'", error)
    assert found is not None
    skip = found[1]
    assert skip == "data.skip=[12-15]"

    job = run_job(poisoned, here, skip, world_size=2)
    assert not (run / "diverged.json").exists()
    assert "goes on with other values than before: data.skip [] -> ['12-15']" in " ".join(job.read_log(0).split())
    run_job(poisoned, f"train.output_dir={straight}", skip, world_size=2)
    assert exact_records(run) == exact_records(straight)
    assert len(exact_records(run)) == STEPS
    assert not any(record.get("skipped") for record in read_records(run))

    refused = error_of(Job(poisoned, here, "train.steps=8", world_size=2), 2)
    newest = run / "checkpoints" / "step_00000006"
    expected = (
        f"data.skip=[]: must leave out [12-15] of the samples before 28, which the checkpoint {newest} has behind"
    )
    assert expected in refused


def make_job(prefix: str, **train: object) -> TrainJob:
    config: Config = config_from_dict(
        {**config_to_dict(make_config(prefix)), "train": {**config_to_dict(make_config(prefix))["train"], **train}}
    )
    data = RunData(train=open_split(config, config.data.train), valid=None, identity=identify(config))
    return TrainJob(
        config=config, derived=derive(config, 1), data=data, groups=single_process_groups(), device=torch.device("cpu")
    )


def test_so_many_skips_in_a_row_stop_the_run(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    left_out = SampleRanges.parse(["0-3", "10"])
    bad = replace(GOOD, loss=math.nan, grad_norm=math.inf, skipped=True, bad_samples=((0, 1), (1, 2)))
    steps = NonFiniteSteps(make_job(prefix, on_nonfinite="skip", max_consecutive_skips=2))
    with caplog.at_level(logging.WARNING, "megalibi"):
        assert steps.judge(1, bad, left_out, "go back")
        assert "(micro batch 0: sample 5), rank 0 on" in caplog.messages[-1]
        assert "'data.skip=[0-12]' leaves the batch out" in caplog.messages[-1]  # 4 to 12 without 10, and what was out
        assert steps.judge(2, bad, left_out, "go back")
        assert steps.judge(3, GOOD, left_out, "go back")
        for step in (4, 5):
            assert steps.judge(step, bad, left_out, "go back")
        with pytest.raises(DivergenceError, match=r"^step 6 has loss nan .* stops; go back, .*; steps in a row: 3$"):
            steps.judge(6, bad, left_out, "go back")
        everywhere = replace(bad, bad_samples=tuple((0, position) for position in range(8)))
        assert not NonFiniteSteps(steps.job).judge(1, everywhere, left_out, "go back")
        assert "the weights are at fault, not the batch" in caplog.messages[-1]
        nowhere = replace(bad, loss=1.0, bad_samples=())
        assert NonFiniteSteps(steps.job).judge(1, nowhere, left_out, "go back")
        assert "it arose in the backward pass" in caplog.messages[-1]


def test_fp16_tries_a_smaller_loss_scale_first(prefix: str) -> None:
    steps = NonFiniteSteps(make_job(prefix, on_nonfinite="stop", precision="fp16"))
    overflowed = replace(GOOD, grad_norm=math.inf, skipped=True, loss_scale=2.0)
    assert steps.judge(1, overflowed, SampleRanges(), "go back")
    assert not steps.judge(2, replace(overflowed, loss=math.nan), SampleRanges(), "go back")
    with pytest.raises(DivergenceError, match=r"with fp16's loss scale at its minimum of 1: the run has diverged"):
        steps.judge(3, replace(overflowed, loss_scale=1.0), SampleRanges(), "go back")


def test_what_is_not_finite_stops_a_run_unless_the_loss_can_be_scaled_less() -> None:
    check_finite(1, GOOD, "bf16", "go back")
    for field in ("loss", "grad_norm"):
        for value in (float("nan"), float("inf")):
            bad = replace(GOOD, **{field: value})
            skipped = replace(bad, skipped=True, loss_scale=2.0)
            for result, precision in (
                (bad, "fp16"),
                (replace(skipped, loss_scale=1.0), "fp16"),
                (skipped, "bf16"),
                (skipped, "fp32"),
            ):
                with pytest.raises(DivergenceError, match=r"^step 7 has .*: .* stops; go back, with a lower"):
                    check_finite(7, result, precision, "go back")
            check_finite(7, skipped, "fp16", "go back")

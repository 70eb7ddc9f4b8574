from __future__ import annotations

from pathlib import Path

from megalibi.checkpoint import list_checkpoints
from tests.support.jobs import Job, read_records, run_job, write_job

FOREVER = "train.steps=1000000"


def error_of(job: Job) -> str:
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        optimizer={"learning_rate": 1e30, "warmup_steps": 0, "clip_grad_norm": 0.0},
        checkpoint={"every_steps": 1, "keep": 0},
    )
    job = Job(config, FOREVER)
    assert job.wait() == [1]
    (error,) = [line for line in job.read_log(0).splitlines() if line.startswith("error: ")]
    records = read_records(tmp_path / "run")
    diverged = records[-1]
    assert f"step {diverged['step']} has loss nan" in error
    assert "Traceback" not in job.read_log(0)
    assert diverged["loss"] == "NaN"  # strict JSON has no NaN
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == [f"step_{step:08d}" for step in range(1, diverged["step"])]


def test_fp16_that_diverges_keeps_the_checkpoints_that_are_good(tmp_path: Path) -> None:
    config = write_job(
        tmp_path, zero={"stage": 0}, train={"precision": "fp16"}, checkpoint={"every_steps": 1, "keep": 1}
    )
    run_job(config, "train.steps=4")
    # Step 5 has a finite loss and destroys the weights; then no loss is a number, whatever it is scaled with.
    job = Job(config, "train.steps=60", "optimizer.learning_rate=1e6", "optimizer.decay_steps=0")
    assert job.wait() == [1], job.output
    losses = {record["step"]: record["loss"] for record in read_records(tmp_path / "run")}
    assert losses[5] != "NaN"
    assert {losses[step] for step in losses if step > 5} == {"NaN"}
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step_00000004", "step_00000005"]
    assert "no checkpoint of step 6: its loss is not finite; step 5 stays the newest" in job.read_log(0)
    error = error_of(job)
    assert "with fp16's loss scale at its minimum of 1: the run has diverged and stops; go back to step 4, the" in error

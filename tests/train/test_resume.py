from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from megalibi.checkpoint import list_checkpoints
from tests.support.jobs import Job, exact_records, last_step, read_records, run_job, write_job

FOREVER = "train.steps=1000000"


def error_of(job: Job) -> str:
    """Return the one line that a job was refused with."""
    assert set(job.wait()) == {2}, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


def test_two_runs_on_one_folder_the_second_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    config = write_job(tmp_path, checkpoint={"every_steps": 1})
    first = Job(config, FOREVER, world_size=2)
    first.wait_until(lambda: last_step(tmp_path / "run") > 2)
    line = error_of(Job(config, FOREVER, world_size=2))
    expected = f"is in use by another run (host {socket.gethostname()}, pid {first.processes[0].pid}, since "
    assert expected in line
    before = last_step(tmp_path / "run")
    first.wait_until(lambda: last_step(tmp_path / "run") > before + 2)
    first.kill()
    done = last_step(tmp_path / "run")
    steps = [record["step"] for record in read_records(tmp_path / "run")]
    assert steps == list(range(1, done + 1))
    run_job(config, f"train.steps={done + 2}", world_size=2)  # a killed run leaves no lock


def test_the_checkpoint_of_another_run_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    config = write_job(tmp_path)
    run_job(config, "train.steps=2")
    run_job(config, "train.steps=4", f"train.output_dir={tmp_path}/other")
    copied = tmp_path / "run" / "checkpoints" / "step_00000004"
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_00000004", copied)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000004\n")
    ids = [json.loads((tmp_path / name / "run_info.json").read_text())["run_id"] for name in ("other", "run")]
    line = error_of(Job(config))
    assert f"{copied} was written by another run (run_id {ids[0]}, this folder's is {ids[1]})" in line

    info = (tmp_path / "run" / "run_info.json").read_bytes()
    (tmp_path / "run" / "run_info.json").unlink()  # its other checkpoint knows it, too
    assert "was written by another run" in error_of(Job(config))
    (tmp_path / "run" / "run_info.json").write_bytes(info)

    shutil.rmtree(copied)
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")  # a folder takes its identity along
    run_job(config, "train.steps=3", f"train.output_dir={tmp_path}/moved")
    (tmp_path / "moved" / "run_info.json").unlink()  # its checkpoints know it, too
    run_job(config, "train.steps=4", f"train.output_dir={tmp_path}/moved")
    assert json.loads((tmp_path / "moved" / "run_info.json").read_text())["run_id"] == ids[1]


def test_a_longer_run_whose_learning_rate_jumps_says_so_and_how_to_keep_it(tmp_path: Path) -> None:
    config = write_job(
        tmp_path, optimizer={"warmup_steps": 0, "decay_steps": 0, "min_learning_rate": 1e-4}, train={"steps": 4}
    )
    run_job(config)
    job = run_job(config, "train.steps=6", "model.dropout=0.1")
    log = job.read_log(0)
    assert "goes on with other values than before: model.dropout 0.0 -> 0.1, train.steps 4 -> 6" in log
    rates = [record["learning_rate"] for record in read_records(tmp_path / "run")]
    assert rates[4] > rates[3]
    said = f"the learning rate was {rates[3]:.3g} in step 4 and is {rates[4]:.3g} in step 5, where the checkpoint's"
    assert f"{said} schedule has 0.0001: optimizer.decay_steps=4 keeps that schedule" in log

    job = run_job(config, "train.steps=8", "optimizer.decay_steps=6", "model.dropout=0.1")
    assert "learning rate" not in job.read_log(0)
    assert [record["learning_rate"] for record in read_records(tmp_path / "run")][6:] == [1e-4, 1e-4]


def test_going_back_names_what_will_go_and_keeps_the_lines(tmp_path: Path) -> None:
    config = write_job(tmp_path, checkpoint={"keep": 0})
    run_job(config)
    run = tmp_path / "run"
    before = exact_records(run)
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step_00000002")  # a link does as well as a file
    job = run_job(config)
    log = job.read_log(0)
    assert "resumed from" in log
    assert "goes back to step_00000002: step_00000004, step_00000006 will be deleted or written over" in log
    lines = f"4 lines of {run}/metrics.jsonl that belong to steps after 2 or cannot be read"
    assert f"{lines} were moved to metrics.dropped.jsonl" in log
    assert exact_records(run) == before
    dropped = (run / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [3, 4, 5, 6]
    assert not (run / "checkpoints" / "latest").is_symlink()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step_{s:08d}" for s in (2, 4, 6)]

    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    job = Job(config, FOREVER, "checkpoint.every_steps=0", "checkpoint.keep=1")
    job.wait_until(lambda: last_step(run) > 7)
    job.signal(signal.SIGTERM)
    job.succeed()
    # What lies beyond step 2 is not deleted before something newer is known to be good.
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == [f"step_{step:08d}" for step in (2, 4, 6, last_step(run))]


def test_a_path_begins_a_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_job(tmp_path)
    run_job(config, "train.steps=4")
    seed, branch = tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "branch"
    command = [f"checkpoint.resume={seed}", f"train.output_dir={branch}"]
    for steps, resumed_from in ((4, seed), (6, branch / "checkpoints" / "step_00000004")):
        job = run_job(config, *command, f"train.steps={steps}")
        assert f"resumed from {resumed_from}" in job.read_log(0)
    assert [record["step"] for record in read_records(branch)] == [3, 4, 5, 6]

    job = Job(config, f"checkpoint.resume={seed}")
    assert job.wait() == [2]
    assert "must be auto or a checkpoint of another run; to go back to this one, write its name into" in job.read_log(0)


def test_a_run_goes_on_with_its_data_wherever_it_stands_and_with_no_other(tmp_path: Path) -> None:
    config = write_job(tmp_path)
    run_job(config, "train.steps=4")
    for suffix in (".bin", ".idx"):
        os.rename(tmp_path / f"tokens{suffix}", tmp_path / f"moved{suffix}")
    moved = f"data.train={tmp_path}/./moved"
    run_job(config, "train.steps=5", moved)
    content = bytearray((tmp_path / "moved.bin").read_bytes())
    content[1_000] ^= 1
    (tmp_path / "moved.bin").write_bytes(content)
    job = Job(config, moved)
    assert job.wait() == [2]
    (line,) = job.read_log(0).splitlines()
    assert line.startswith(f"error: data.train={tmp_path}/./moved (20,000 tokens in 21 documents, sha256 ")
    assert "step_00000005 was trained on (20,000 tokens in 21 documents, sha256 " in line
    assert [record["step"] for record in read_records(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_on_another_topology_and_says_so(tmp_path: Path) -> None:
    config = write_job(tmp_path)
    run_job(config, f"train.output_dir={tmp_path}/straight")
    run_job(config, "train.steps=2")
    changes = ["parallel.tensor_parallel_size=2", "zero.stage=3", "train.micro_batch_size=1"]
    job = run_job(config, "train.steps=4", *changes, world_size=4)
    assert (
        "goes on with other values than before: ranks 1 -> 4, train.steps 2 -> 4, train.micro_batch_size 2 -> 1, "
        "parallel.tensor_parallel_size 1 -> 2, zero.stage 1 -> 3"
    ) in " ".join(job.read_log(0).split())
    run_job(config, "zero.stage=2", world_size=2)
    straight, changed = read_records(tmp_path / "straight"), read_records(tmp_path / "run")
    assert [record["step"] for record in changed] == [record["step"] for record in straight]
    assert [record["sample_hash"] for record in changed] == [record["sample_hash"] for record in straight]
    losses = [[record["loss"] for record in records] for records in (changed, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=0)

from __future__ import annotations

import logging
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from megalibi.checkpoint import find_checkpoint, list_checkpoints
from megalibi.checkpoint.writing import host_memory
from megalibi.checkpoint.writing.attempt import Attempt
from megalibi.checkpoint.writing.rank_files import RankFiles
from megalibi.config import Config, derive
from megalibi.engine.build import DeepSpeedEngine
from megalibi.errors import FileError
from megalibi.metrics.writers import Writers
from megalibi.parallel import ProcessGroups
from megalibi.train import job as train_job
from megalibi.train.resume import Start
from megalibi.train.saving import Saves
from tests.support.checkpoints import assert_whole
from tests.support.jobs import Job, last_step, read_records, run_job, write_job
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, build, identify, make_config, write_tokens

FOREVER = "train.steps=1000000"


def error_of(job: Job) -> str:
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        optimizer={"learning_rate": 1e30, "warmup_steps": 0, "clip_grad_norm": 0.0},
        checkpoint={"every_steps": 1, "keep": 0, "asynchronous": True},
        model={"hidden_size": 192, "ffn_hidden_size": 768},  # the next step begins long before a save is written
    )
    job = Job(config, FOREVER)
    assert job.wait() == [2]
    (error,) = [line for line in job.read_log(0).splitlines() if line.startswith("error: ")]
    records = read_records(tmp_path / "run")
    diverged = records[-1]
    assert f"step {diverged['step']} has loss nan" in error
    assert "Traceback" not in job.read_log(0)
    assert diverged["loss"] == "NaN"  # strict JSON has no NaN
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    last = diverged["step"] - 1
    assert names == [f"step_{step:08d}" for step in range(1, last)]  # not the last, whose weights gave no number
    assert f"the checkpoint of step {last} is given up: its weights gave no good loss" in job.read_log(0)
    way_back = f"go back to step {last - 1}, the newest checkpoint" if last > 1 else "start anew"
    assert f"the run has diverged and stops; {way_back}" in error
    assert not any((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_fp16_that_diverges_keeps_the_checkpoints_that_are_good(tmp_path: Path) -> None:
    config = write_job(
        tmp_path, zero={"stage": 0}, train={"precision": "fp16"}, checkpoint={"every_steps": 1, "keep": 1}
    )
    run_job(config, "train.steps=4")
    # Step 5 has a finite loss and destroys the weights; then no loss is a number, whatever it is scaled with.
    job = Job(config, "train.steps=60", "optimizer.learning_rate=1e6", "optimizer.decay_steps=0")
    assert job.wait() == [2], job.output
    losses = {record["step"]: record["loss"] for record in read_records(tmp_path / "run")}
    assert losses[5] != "NaN"
    assert {losses[step] for step in losses if step > 5} == {"NaN"}
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step_00000004", "step_00000005"]
    assert "no checkpoint of step 6: its loss is not finite; step 5 stays the newest" in job.read_log(0)
    error = error_of(job)
    assert "with fp16's loss scale at its minimum of 1: the run has diverged and stops; go back to step 4, the" in error


def test_saves_faster_than_the_disk_wait_and_a_signal_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    """Every step saves, and a save takes longer than a step."""
    config = write_job(
        tmp_path,
        model={"hidden_size": 192, "ffn_hidden_size": 768},
        checkpoint={"every_steps": 1, "keep": 0},
    )
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    job = Job(config, FOREVER)
    job.wait_until(lambda: last_step(run) > 3 and any(checkpoints.glob("*.partial")))
    job.signal(signal.SIGTERM)
    job.succeed()
    log, stopped = job.read_log(0), last_step(run)
    waited = [int(step) for step in re.findall(r"waited \d+\.\d s for the checkpoint of step (\d+) to be written", log)]
    assert len(waited) > 2
    assert waited[-1] in (stopped - 1, stopped)
    assert f"stopped by SIGTERM after step {stopped}, checkpoint saved; the same command goes on" in log
    saved = list_checkpoints(checkpoints)
    assert [assert_whole(path) for path in saved] == list(range(1, stopped + 1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", *(path.name for path in saved)]

    job = Job(config, FOREVER)
    job.wait_until(lambda: last_step(run) > stopped and any(checkpoints.glob("*.partial")))
    job.kill()
    kept = find_checkpoint(checkpoints)
    assert kept is not None
    resumed = assert_whole(kept)
    assert stopped <= resumed <= last_step(run)
    job = run_job(config, f"train.steps={resumed + 1}", "checkpoint.asynchronous=false", "checkpoint.keep=1")
    assert f"step_{resumed:08d}" in job.read_log(0)
    assert "waited" not in job.read_log(0)
    assert not any(checkpoints.glob("*.partial"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_complete_checkpoint_deletes_the_failures_file(tmp_path: Path, asynchronous: bool) -> None:
    config = write_job(tmp_path, checkpoint={"asynchronous": asynchronous})
    run, failures = tmp_path / "run", tmp_path / "failures"
    failures.write_text("1\n")
    options = (FOREVER, f"--failures-file={failures}")
    job = Job(config, "checkpoint.every_steps=0", *options, world_size=2)
    job.wait_until(lambda: last_step(run) >= 5)
    job.kill()
    assert failures.read_text() == "1\n"

    job = Job(config, *options, world_size=2)
    job.wait_until(lambda: not failures.exists())
    assert list_checkpoints(run / "checkpoints")
    job.kill()


def make_saves(config: Config, engine: DeepSpeedEngine, groups: ProcessGroups, asynchronous: bool | None) -> Saves:
    checkpoint = replace(config.checkpoint, asynchronous=asynchronous)
    train = train_job.open_split(config, config.data.train)
    job = train_job.Job(
        config=replace(config, checkpoint=checkpoint),
        derived=derive(config, groups.world.size),
        data=train_job.RunData(train=train, valid=None, identity=identify(config)),
        groups=groups,
        device=CPU,
    )
    return Saves(job, Start(run_id="a", checkpoint=None), engine, Writers(), 0)


def save_where_memory_is_scarce(config: Config) -> tuple[list[tuple[int, int | None]], list[str]]:
    """Save with each value of checkpoint.asynchronous; return the step saved and the one in flight, and the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megalibi.train.saving").addHandler(handler)
    logging.getLogger("megalibi.train.saving").setLevel(logging.INFO)
    engine, groups = build(config)
    states = []
    share, host_memory.LARGEST_SHARE = host_memory.LARGEST_SHARE, 0.0
    for asynchronous in (None, False, True):
        saves = make_saves(config, engine, groups, asynchronous)
        for step in (1, 2):
            saves.save(step)
        states.append((saves.saved, saves.saver.pending_step))
        saves.finish()
    host_memory.LARGEST_SHARE = share
    engine.destroy()
    return states, lines


def test_where_memory_is_scarce_the_training_waits_and_one_line_says_why(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path, num_tokens=10_000)
    config = make_config(prefix, train={"output_dir": str(tmp_path / "run")})
    ((states, lines),) = run_on_ranks(1, save_where_memory_is_scarce, config)
    assert states == [(2, None), (2, None), (1, 2)]
    assert lines[0].startswith("checkpoints are written while the training waits: the copies of the ranks on ")
    assert lines[0].endswith("of which they may take 0% (checkpoint.asynchronous=true does not ask)")
    assert [line.split(" ", 2)[0] for line in lines[1:]] == ["waited", "waited"]


def meet_failures(config: Config) -> list[object]:
    """Let saves in flight be given up, fail, and find no memory on the last rank; return what came of each."""
    engine, groups = build(config)
    folder = Path(config.train.output_dir) / "checkpoints"
    is_last = groups.world.rank == groups.world.size - 1
    saves = make_saves(config, engine, groups, True)
    came: list[object] = []

    saves.save(1)
    saves.confirm()
    came.append(saves.saver._pending.partial.is_dir())  # what is in flight is no leftover
    saves.pending_is_good = False
    saves.judge_weights(False)
    saves.abandon()
    came.append((saves.saved, saves.saver.pending_step, list_checkpoints(folder)))
    saves.judge_weights(True)
    saves.save(1)
    while not saves.saver._pending.is_written:
        saves.saver.poll()
    saves.pending_is_good = False
    saves.abandon()
    came.append(saves.saved)  # for it was being committed

    def begin_to_fail(step: int) -> None:
        saves.save(step)
        saves.saver._pending.task.result()
        saves.saver._pending.task._values[0] = Attempt(None, f"file of {step}" if is_last else None)

    begin_to_fail(2)
    saves.save(2, wait=True)
    came.append(saves.saved)
    begin_to_fail(3)
    saves.saver.save = lambda step: saves.saver._raise_together(f"again {step}", None)
    with pytest.raises(FileError) as refusal:
        saves.save(4, wait=True)
    came.append(str(refusal.value))
    came += [_save_without_memory(make_saves(config, engine, groups, choice), is_last) for choice in (None, True)]
    engine.destroy()
    return came


def _save_without_memory(saves: Saves, is_last: bool) -> object:
    def copy(files: RankFiles) -> RankFiles:
        if is_last:
            raise KeyError("of no kind that anybody foresaw")
        return files

    saves.saver._snapshot.copy = copy
    try:
        saves.save(5)
    except FileError as error:
        return str(error)
    return saves.saved, saves.asynchronous, saves.saver.pending_step


def test_saves_that_fail_or_are_not_wanted_leave_the_run_with_the_best_that_can_be_had(tmp_path: Path) -> None:
    config = make_config(write_tokens(tmp_path, num_tokens=10_000), train={"output_dir": str(tmp_path / "run")})
    first, second = run_on_ranks(2, meet_failures, config)
    assert first == second
    start = "checkpoint not written, the one before it stays: "
    *others, refused = first
    assert others == [True, (0, None, []), 1, 2, f"{start}file of 3", (5, False, None)]
    assert refused.startswith(start)
    assert "KeyError('of no kind that anybody foresaw'); checkpoint.asynchronous=false needs no memory" in refused
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [assert_whole(path) for path in list_checkpoints(checkpoints)] == [1, 2, 5]
    assert not any(checkpoints.glob("*.partial"))

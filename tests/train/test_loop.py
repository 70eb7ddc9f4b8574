from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalibi.checkpoint import find_checkpoint, list_checkpoints
from megalibi.data.dataset import open_dataset
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.errors import DataError
from tests.support.device import ON_GPU
from tests.support.jobs import Job, exact_records, last_step, read_records, run_job, write_job
from tests.support.runs import VOCAB_SIZE, make_config, write_tokens

ROOT = Path(__file__).parents[2]
FOREVER = "train.steps=1000000"
STEPS = 20
KILLED_AFTER_CHECKPOINT = 10
RANKS = 1 if ON_GPU else 2
GONE_SECONDS = 10.0
"""How soon ranks end whose peer was killed: at once, for its connections close; long before any timeout."""


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.gpu), "bf16"])
def test_killed_and_resumed_is_straight_bit_for_bit_and_samples_are_the_same_everywhere(
    tmp_path: Path, precision: str
) -> None:
    config = write_job(
        tmp_path,
        parallel={"tensor_parallel_size": RANKS},
        train={
            "steps": STEPS,
            "precision": precision,
            "eval_every_steps": 5,
            "eval_samples": 5,
            "deterministic": ON_GPU,  # there nothing is promised of another run
        },
        data={"valid": str(tmp_path / "tokens")},
        checkpoint={"every_steps": KILLED_AFTER_CHECKPOINT},
    )
    run = tmp_path / "run"
    straight = tmp_path / "straight"
    run_job(config, f"train.output_dir={straight}", world_size=RANKS)

    job = Job(config, FOREVER, world_size=RANKS)
    saved = run / "checkpoints" / f"step_{KILLED_AFTER_CHECKPOINT:08d}"
    job.wait_until(lambda: last_step(run) > KILLED_AFTER_CHECKPOINT and saved.exists())
    job.kill()
    checkpoint = find_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    # The job went on beyond the checkpoint; with a torn line, as a crash of the machine leaves it.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "los')
    (run / "checkpoints" / "latest").write_text("step_00000010\n")  # go back to it
    job = run_job(config, world_size=RANKS)
    assert "resumed from" in job.read_log(0)
    assert exact_records(run) == exact_records(straight)
    assert len(exact_records(run)) == STEPS + STEPS // 5

    if precision == "fp32" and not ON_GPU:  # each of them starts anew there
        for world_size, overrides in (
            (1, ["parallel.tensor_parallel_size=1", "train.micro_batch_size=4"]),
            (2, ["parallel.tensor_parallel_size=1", "train.micro_batch_size=1", "zero.stage=2"]),
        ):
            other = tmp_path / f"other_{world_size}"
            run_job(config, *overrides, f"train.output_dir={other}", world_size=world_size)
            assert sample_hashes(other) == sample_hashes(straight)
        assert len(set(sample_hashes(straight))) == STEPS


def sample_hashes(run: Path) -> list[str]:
    return [record["sample_hash"] for record in read_records(run) if "sample_hash" in record]


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_deterministic_run_that_was_resumed_is_the_straight_one_bit_for_bit(
    tmp_path: Path, document_mask: bool
) -> None:
    config = write_job(
        tmp_path,
        train={"steps": 6, "precision": "bf16", "deterministic": True},
        model={"recompute": "full"},
        data={"document_mask": document_mask},
    )
    run, straight = tmp_path / "run", tmp_path / "straight"
    run_job(config, f"train.output_dir={straight}")
    run_job(config, "train.steps=3")
    job = run_job(config)
    assert "resumed from" in job.read_log(0)
    assert exact_records(run) == exact_records(straight)
    assert len(exact_records(run)) == 6
    assert json.loads((run / "run_info.json").read_text())["deterministic"] is True


def test_signals_save_and_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    """No checkpoint is due, so that what a restart finds is the signal's."""
    config = write_job(tmp_path, parallel={"tensor_parallel_size": 2}, checkpoint={"every_steps": 0, "keep": 1})
    run = tmp_path / "run"
    for number, rank in ((signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGUSR1, 1)):
        job = Job(config, FOREVER, world_size=2)
        before = last_step(run)
        job.wait_until(lambda before=before: last_step(run) > before + 1)
        job.signal(number, rank)
        job.succeed()
        stopped = last_step(run)
        # No loss after it has shown yet that the newest is good, so that the one before stays.
        kept = [f"step_{step:08d}" for step in (before, stopped) if step]
        assert [path.name for path in list_checkpoints(run / "checkpoints")] == kept
        assert f"stopped by {number.name} after step {stopped}, checkpoint saved" in job.read_log(rank)

    steps = f"train.steps={stopped + 2}"
    run_job(config, steps, world_size=2)
    records = read_records(run)
    job = run_job(config, steps, world_size=2)
    assert f"nothing to do: step {stopped + 2} of train.steps={stopped + 2} is done" in job.read_log(0)
    assert read_records(run) == records

    run_job(config, steps, f"train.output_dir={tmp_path}/straight", world_size=2)
    assert exact_records(run) == exact_records(tmp_path / "straight")


def test_trap_15_a_killed_rank_ends_the_others_whatever_the_launcher_does(tmp_path: Path) -> None:
    """deepspeed's launcher may leave the other ranks running: they must end by themselves, and say where."""
    config = write_job(tmp_path, parallel={"tensor_parallel_size": 2})
    job = Job(config, FOREVER, world_size=2)
    job.wait_until((tmp_path / "run" / "checkpoints" / "latest").exists)
    began = time.monotonic()
    job.signal(signal.SIGKILL, rank=1)
    assert job.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - began < GONE_SECONDS
    said = r"error: a rank at 127\.\S+ has ended or is cut off \(Connection (closed|reset) by peer\): what it said last"
    assert re.search(said, job.read_log(0))
    assert "Traceback" not in job.read_log(0)
    assert find_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_a_rank_that_alone_meets_bad_data_ends_the_job_and_names_itself(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path, num_tokens=100_000)
    config = write_job(tmp_path, data={"train": prefix}, checkpoint={"every_steps": 0})
    place = spoil_one_sample(write_tokens(tmp_path, num_tokens=100_000))
    job = Job(config, FOREVER, world_size=2)
    codes = job.wait()
    assert codes == [2, 2]
    (error,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert f"tokens.bin: token {place} is id {VOCAB_SIZE}, past vocab_size={VOCAB_SIZE}" in error
    done = last_step(tmp_path / "run")
    saved = f"[rank 1 on {socket.gethostname()}]; stopped after step {done}, checkpoint saved; the same command goes on"
    assert error.endswith(f"{saved} when the data is mended (other data wants checkpoint.accept_other_data=true)")
    assert "Traceback" not in job.output
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step_{done:08d}"

    write_tokens(tmp_path, num_tokens=100_000)
    steps = f"train.steps={done + 3}"
    assert "checkpoint.accept_other_data=true" in refusal_of(Job(config, steps, world_size=2))
    job = run_job(config, steps, "checkpoint.accept_other_data=true", world_size=2)
    assert (
        "data.train is not what the checkpoint was trained on: from here on the samples may be different ones"
        in job.read_log(0)
    )
    assert [record["step"] for record in read_records(tmp_path / "run")] == list(range(1, done + 4))


def test_a_token_file_that_changes_under_a_run_ends_it_in_order(tmp_path: Path) -> None:
    config = write_job(tmp_path, checkpoint={"every_steps": 0})
    run, tokens = tmp_path / "run", tmp_path / "tokens.bin"
    job = Job(config, FOREVER, world_size=2)
    job.wait_until(lambda: last_step(run) > 2)
    place = tokens.stat().st_size // 2
    with tokens.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 1]))
    assert job.wait() == [2, 2]
    error, done = error_of(job), last_step(run)
    assert f"{tokens}: changed while it is being read (of the same size): put the file back as it was" in error
    assert f"; stopped after step {done}, checkpoint saved; the same command goes on when the data is mended" in error
    steps = f"train.steps={done + 1}"
    assert f"data.train={tmp_path}/tokens (20,000 tokens" in refusal_of(Job(config, steps, world_size=2))
    with tokens.open("r+b") as file:
        file.seek(place)
        file.write(bytes([old]))
    run_job(config, steps, world_size=2)


def refusal_of(job: Job) -> str:
    assert set(job.wait()) == {2}, job.output
    return error_of(job)


def spoil_one_sample(prefix: str, first: int = 12) -> int:
    """Write an id past the vocabulary where only rank 1 of 2 will read it, after some samples; return its place."""
    train = make_config(prefix).train
    dataset = open_dataset(prefix, seq_length=33, seed=train.seed, vocab_size=VOCAB_SIZE)
    samples = np.arange(first, 400)
    samples = samples[samples % 4 >= 2]  # batches of 4 samples, the last two of which are rank 1's
    for sample in dataset.sample_ids(samples)[:, 1].tolist():
        place = sample * 33 + 16
        tokens = np.memmap(f"{prefix}.bin", np.uint16, "r+")
        good = tokens[place]
        tokens[place] = VOCAB_SIZE
        tokens.flush()
        try:  # the look at some places before the start must miss it
            open_dataset(prefix, seq_length=33, seed=train.seed, vocab_size=VOCAB_SIZE)
        except DataError:
            tokens[place] = good
        else:
            return place
    raise AssertionError("no place is missed")


def test_a_validation_reads_all_of_a_blend_on_any_number_of_ranks(tmp_path: Path) -> None:
    """One set has a sample, the other nine: the loss of the blend is theirs, one to nine."""
    for name, num_samples in (("one", 1), ("nine", 9)):
        tokens = np.random.default_rng(num_samples).integers(0, 20 * num_samples, 33 * num_samples + 1)
        with TokenFileWriter(tmp_path / name, VOCAB_SIZE) as writer:
            writer.add_document(tokens)
    config = write_job(tmp_path, train={"steps": 1, "micro_batch_size": 1, "eval_samples": 16})

    def validate(valid: str, world_size: int = 1) -> dict[str, Any]:
        run = tmp_path / f"run_{world_size}_{len(valid)}"
        job = run_job(config, f"data.valid={valid}", f"train.output_dir={run}", world_size=world_size)
        record = read_records(run)[-1]
        said = f"{record['validation_samples']} samples, all of data.valid: train.eval_samples=16"
        assert said in job.read_log(0)
        return record

    one, nine = (validate(str(tmp_path / name)) for name in ("one", "nine"))
    expected = 0.1 * one["validation_loss"] + 0.9 * nine["validation_loss"]
    assert abs(one["validation_loss"] - nine["validation_loss"]) > 1e-4  # far more than what rounding does
    for world_size in (1, 2):
        blend = f"[{{prefix: {tmp_path}/one, weight: 0.5}}, {{prefix: {tmp_path}/nine, weight: 0.5}}]"
        record = validate(blend, world_size)
        assert (record["validation_samples"], record["validation_tokens"]) == (10, 330)
        assert record["validation_loss"] == pytest.approx(expected, rel=1e-6)


def error_of(job: Job) -> str:
    (line,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in job.output
    return line


def test_a_stop_in_a_validation_saves_and_the_next_start_validates_first(tmp_path: Path) -> None:
    """In the last one, too; the validations are long, of batches of one sample."""
    config = write_job(
        tmp_path,
        data={"valid": str(tmp_path / "tokens")},
        train={"steps": 4, "eval_every_steps": 2, "eval_samples": 500, "micro_batch_size": 1},
        checkpoint={"every_steps": 0},
    )
    run, straight = tmp_path / "run", tmp_path / "straight"
    run_job(config, f"train.output_dir={straight}", world_size=2)
    for step in (2, 4):
        job = Job(config, world_size=2)
        job.wait_until(lambda step=step: last_step(run) == step)
        job.signal(signal.SIGTERM, rank=1)
        job.succeed()
        assert f"stopped by SIGTERM after step {step}, checkpoint saved; the same command goes on" in job.read_log(1)
        validated = [record["step"] for record in read_records(run) if "validation_loss" in record]
        assert validated == list(range(2, step, 2))  # else the signal came too late to show anything
    run_job(config, world_size=2)
    assert exact_records(run) == exact_records(straight)
    job = run_job(config, world_size=2)
    assert "nothing to do: step 4 of train.steps=4 is done" in job.read_log(0)
    assert exact_records(run) == exact_records(straight)


def test_what_one_rank_meets_in_a_validation_costs_no_step_and_is_said_by_name(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path, num_tokens=100_000)
    (tmp_path / "valid").mkdir()
    valid = write_tokens(tmp_path / "valid", num_tokens=100_000)
    config = write_job(
        tmp_path,
        data={"train": prefix, "valid": valid},
        train={"steps": 3, "eval_samples": 400},
        checkpoint={"every_steps": 0},
    )
    prefix = write_tokens(tmp_path, num_tokens=100_000)
    place = spoil_one_sample(valid, first=0)
    job = Job(config, world_size=2)
    assert job.wait() == [2, 2]
    error = error_of(job)
    assert f"{valid}.bin: token {place} is id {VOCAB_SIZE}, past vocab_size={VOCAB_SIZE}" in error
    assert error.endswith(
        f"[rank 1 on {socket.gethostname()}]; stopped after step 3, checkpoint saved; the same command goes on when "
        "the data is mended (other data wants checkpoint.accept_other_data=true)"
    )
    assert [record["step"] for record in read_records(tmp_path / "run")] == [1, 2, 3]
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step_00000003"

    (tmp_path / "valid").joinpath("tokens.bin").unlink()
    write_tokens(tmp_path / "valid", num_tokens=100_000)
    run_job(config, world_size=2)
    assert [record["step"] for record in read_records(tmp_path / "run")] == [1, 2, 3, 3]

"""The loop: the only place where data, model, engine, checkpoint and report meet. Read it from the top down."""

from __future__ import annotations

import json
import math
import platform
import socket
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

import megalibi
from megalibi.checkpoint import CHECKPOINTS, LATEST, check_resumable, find_checkpoint, load_checkpoint, save_checkpoint
from megalibi.config import Config, ConfigError, DatasetConfig, Derived, derive, learning_rate_at, save_config
from megalibi.data.dataset import Dataset, open_dataset
from megalibi.data.hashing import format_sample_hash
from megalibi.data.identity import DataIdentity
from megalibi.data.loader import Batch, Loader, ValidationLoader
from megalibi.data.provenance import identify_data, say_unrecorded
from megalibi.data.tokenizer import load_tokenizer
from megalibi.engine.build import DeepSpeedEngine, build_engine
from megalibi.engine.evaluate import validation_loss
from megalibi.engine.step import StepResult, train_step
from megalibi.engine.stop import StopRequest
from megalibi.files import make_folder, write_aside
from megalibi.log import get_logger
from megalibi.model import count_parameters, model_flops_per_token
from megalibi.parallel import ProcessGroups
from megalibi.report import StepRecord, ValidationRecord, Writers, build_writers, memory_bytes, memory_peak_bytes
from megalibi.report.outputs import check_run_folder

_LOGGER = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run learns from, opened and checked once."""

    train: Dataset
    """data.train."""
    valid: Dataset | None
    """data.valid."""
    identity: DataIdentity
    """What tells it from other data."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same from the first step to the last."""

    config: Config
    """The run."""
    derived: Derived
    """What follows from it on this world."""
    data: RunData
    """What it learns from."""
    groups: ProcessGroups
    """Of this process."""
    device: torch.device
    """Where this rank computes."""


def check_run(config: Config, world_size: int) -> tuple[Derived, RunData]:
    """Find everything that is wrong with a run before anything is allocated.

    Returns:
        What follows from the configuration, and its data.

    Raises:
        ConfigError: With the field, its value and what is allowed.
    """
    derived = derive(config, world_size)
    check_run_folder(Path(config.train.output_dir), "train.output_dir", folders=(CHECKPOINTS,))
    train = open_split(config, config.data.train)
    valid = open_split(config, config.data.valid) if config.data.valid else None
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer="
            f"{config.data.tokenizer}: at least {tokenizer.vocab_size} is allowed"
        )
    identity = identify_data(train.token_files, valid.token_files if valid else [], tokenizer)
    checkpoint = find_resume(config)
    if checkpoint is not None:
        check_resumable(checkpoint, config, identity, world_size)
    return derived, RunData(train=train, valid=valid, identity=identity)


def open_split(config: Config, split: tuple[DatasetConfig, ...]) -> Dataset:
    """Open the token files of data.train or data.valid."""
    return open_dataset(
        [(dataset.prefix, dataset.weight) for dataset in split],
        seq_length=config.data.seq_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
    )


def find_resume(config: Config) -> Path | None:
    """Return the checkpoint that ``checkpoint.resume`` means; None: the run starts anew.

    A path is where a run begins that has no checkpoints of its own yet: the same command, started again by a scheduler,
    goes on instead of beginning there for ever.
    """
    folder, resume = checkpoints_folder(config), config.checkpoint.resume
    own = find_checkpoint(folder)
    if resume == "none" and own is not None:
        raise ConfigError(
            f"checkpoint.resume=none, but {own} exists: use checkpoint.resume=auto or another train.output_dir"
        )
    if own is None:
        return None if resume in ("auto", "none") else Path(resume)
    if Path(resume).resolve().parent == folder.resolve():
        raise ConfigError(
            f"checkpoint.resume={resume} is of this run itself: to go back to it, write its name into "
            f"{folder / LATEST} and use checkpoint.resume=auto"
        )
    return own


def agree_on_resume(config: Config, groups: ProcessGroups) -> Path | None:
    """Return what rank 0 resumes from, on every rank: file systems may show them different things."""
    agreed = [find_resume(config)]
    if groups.world.size > 1:
        dist.broadcast_object_list(agreed)
    return agreed[0]


def checkpoints_folder(config: Config) -> Path:
    """Return the run's folder of checkpoints."""
    return Path(config.train.output_dir) / CHECKPOINTS


def train(job: Job) -> None:
    """Train from the start or the checkpoint to resume from, until the last step or a signal.

    Every rank calls it, with torch.distributed initialised.

    Args:
        job: The run, checked by check_run, and this rank's place in it.

    Raises:
        ConfigError: A damaged checkpoint, a full disk, a token id past the vocabulary.
        FloatingPointError: The loss or the gradient is no number any more.
    """
    config, groups = job.config, job.groups
    stop = StopRequest()
    checkpoint = agree_on_resume(config, groups)
    engine = build_engine(config, job.derived, groups, job.device)
    first_step = 0 if checkpoint is None else load_checkpoint(engine, checkpoint, groups).step
    if groups.world.rank == 0:
        describe_run(job, checkpoint)
    loader = Loader(
        job.data.train,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        document_mask=config.data.document_mask,
    )
    writers = build_writers(
        config.train.output_dir,
        rank=groups.world.rank,
        total_steps=config.train.steps,
        log_every_steps=config.train.log_every_steps,
        resumed_step=first_step,
        eval_samples=config.train.eval_samples,
    )
    with writers:
        run_steps(job, engine, loader, writers, first_step, stop)
    loader.close()


def run_steps(
    job: Job, engine: DeepSpeedEngine, loader: Loader, writers: Writers, first_step: int, stop: StopRequest
) -> None:
    """Take the steps; validate and save where they are due."""
    config, groups = job.config, job.groups
    if first_step >= config.train.steps:
        _LOGGER.info("nothing to do: step %d of train.steps=%d is done", first_step, config.train.steps)
    for step in range(first_step, config.train.steps):
        began = time.perf_counter()
        result = train_step(
            engine,
            read_batches(loader, step * config.train.global_batch_size, groups),
            groups=groups,
            device=job.device,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
            seed=config.train.seed,
            samples_consumed=step * config.train.global_batch_size,
        )
        writers.step(make_record(job, step, result, time.perf_counter() - began))
        check_finite(step + 1, result, config.train.precision)

        done, stopping = step + 1, stop.is_agreed(groups, job.device)
        last = done == config.train.steps
        if job.data.valid and not stopping and (last or is_due(done, config.train.eval_every_steps)):
            writers.validation(validate(job, job.data.valid, engine, done))
        if stopping or last or is_due(done, config.checkpoint.every_steps):
            writers.sync()  # no checkpoint is on the disk before the lines of its steps
            save_checkpoint(
                engine, config, job.derived, job.data.identity, groups, folder=checkpoints_folder(config), step=done
            )
        if stopping:
            reason = stop.signal_name or "a signal to another rank"
            _LOGGER.warning("stopped by %s after step %d, checkpoint saved; the same command goes on", reason, done)
            return


def read_batches(loader: Loader, samples_consumed: int, groups: ProcessGroups) -> list[Batch]:
    """Return this rank's micro batches; a rank that alone meets bad data says so, for only rank 0 prints errors."""
    try:
        return loader.micro_batches(samples_consumed)
    except ConfigError as error:
        if groups.world.rank != 0:
            _LOGGER.error("%s", error)
        raise


def check_finite(step: int, result: StepResult, precision: str) -> None:
    """Stop a run whose loss or gradient is no number any more, before it saves that or repeats it for ever.

    Only fp16 has a remedy, to skip the step and scale the loss less; DeepSpeed skips such steps in any precision.

    Raises:
        FloatingPointError: On every rank, for all have the same result.
    """
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    scales_less = precision == "fp16" and result.skipped and result.loss_scale > 1.0
    if not finite and not scales_less:
        raise FloatingPointError(
            f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}: the run has diverged and stops; "
            "the checkpoints before it are whole, lower optimizer.learning_rate or go back to an earlier one"
        )


def is_due(step: int, every_steps: int) -> bool:
    """Return whether something that happens every so many steps happens after this one; 0: never."""
    return every_steps > 0 and step % every_steps == 0


def make_record(job: Job, step: int, result: StepResult, seconds: float) -> StepRecord:
    """Return the line of metrics.jsonl for a step."""
    config, batch_tokens = job.config, job.derived.batch_tokens
    full, causal = (
        1e-12 * batch_tokens * model_flops_per_token(config.model, config.data.seq_length, causal=causal)
        for causal in (False, True)
    )
    fp16 = config.train.precision == "fp16"
    return StepRecord(
        step=step + 1,
        tokens=(step + 1) * batch_tokens,
        samples=(step + 1) * config.train.global_batch_size,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate_at(step, config.optimizer, config.train.steps),
        step_seconds=seconds,
        tokens_per_second=batch_tokens / seconds,
        model_tflops_per_second=full / seconds,
        model_tflops_per_second_causal=causal / seconds,
        memory_bytes=memory_bytes(job.device),
        memory_peak_bytes=memory_peak_bytes(job.device),
        sample_hash=format_sample_hash(result.sample_hash),
        loss_scale=result.loss_scale if fp16 else None,
        skipped=result.skipped if fp16 else None,
    )


def validate(job: Job, dataset: Dataset, engine: DeepSpeedEngine, step: int) -> ValidationRecord:
    """Return the loss on the first ``train.eval_samples`` samples of data.valid, or on all if they are fewer."""
    config, groups = job.config, job.groups
    began = time.perf_counter()
    loader = ValidationLoader(
        dataset,
        num_samples=config.train.eval_samples,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        document_mask=config.data.document_mask,
    )
    engine.eval()
    loss, tokens = validation_loss(engine, loader, groups=groups, device=job.device)
    engine.train()
    return ValidationRecord(
        step=step,
        tokens=step * job.derived.batch_tokens,
        validation_loss=loss,
        validation_perplexity=math.exp(min(loss, 700.0)),
        validation_tokens=tokens,
        validation_seconds=time.perf_counter() - began,
        validation_samples=loader.num_samples,
    )


def describe_run(job: Job, checkpoint: Path | None) -> None:
    """Write config.yaml and run_info.json, and say what begins."""
    config, groups, device = job.config, job.groups, job.device
    folder = Path(config.train.output_dir)
    make_folder(folder)
    save_config(config, folder / "config.yaml")
    parameters = count_parameters(config.model)
    info = {
        "num_parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "host": socket.gethostname(),
        "ranks": f"{groups.world.size}: tensor {groups.tensor.size} x data {groups.data.size}",
        "megalibi": megalibi.__version__,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }
    write_aside(folder / "run_info.json", json.dumps(info, indent=1) + "\n")
    say_unrecorded(dataset.prefix for dataset in (*config.data.train, *config.data.valid))
    _LOGGER.info(
        "%s parameters on %d ranks (tensor %d x data %d, ZeRO %d, %s), %s tokens per step, %s",
        f"{parameters:,}",
        groups.world.size,
        groups.tensor.size,
        groups.data.size,
        config.zero.stage,
        config.train.precision,
        f"{job.derived.batch_tokens:,}",
        f"resumed from {checkpoint}" if checkpoint else "from the start",
    )

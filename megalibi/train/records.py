"""What a run writes of itself: who it is, as it starts, and the record of each step and validation."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

from megalibi.config import learning_rate_at, save_config
from megalibi.data.hashing import format_sample_hash
from megalibi.data.provenance import say_unrecorded
from megalibi.engine.step import StepResult
from megalibi.errors import DivergenceError, FileError
from megalibi.files import write_aside, write_json
from megalibi.log import get_logger
from megalibi.metrics.memory import memory_bytes, memory_peak_bytes
from megalibi.metrics.provenance import describe_run
from megalibi.metrics.records import (
    CONFIG_FILE,
    DIVERGED_FILE,
    INFO_FILE,
    StepRecord,
    ValidationRecord,
)
from megalibi.model import count_parameters, model_flops_per_token
from megalibi.parallel import gather_objects
from megalibi.runtime.device import describe_device
from megalibi.train.job import Job
from megalibi.train.pace import Pace
from megalibi.train.resume import Start

_LOGGER = get_logger(__name__)


def record_start(job: Job, start: Start) -> None:
    """Write config.yaml and run_info.json, and log what begins. Rank 0 calls it, when the engine is loaded.

    What an earlier start has left of a divergence is removed: this one may get past it.
    """
    config, groups, device = job.config, job.groups, job.device
    folder = Path(config.train.output_dir)
    (folder / DIVERGED_FILE).unlink(missing_ok=True)
    save_config(config, folder / CONFIG_FILE)
    parameters = count_parameters(config.model)
    provenance = describe_run(str(device), ("torch", "deepspeed"))
    info = {
        "run_id": start.run_id,
        "num_parameters": parameters,
        "device": describe_device(device),
        "host": socket.gethostname(),
        "deterministic": config.train.deterministic,
        "ranks": f"{groups.world.size}: tensor {groups.tensor.size} x data {groups.data.size}",
        **provenance["versions"],
        **{name: provenance[name] for name in ("command", "commit", "date")},
    }
    write_aside(folder / INFO_FILE, json.dumps(info, indent=1) + "\n")
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
        f"resumed from {start.checkpoint}" if start.checkpoint else "from the start",
    )


def record_divergence(job: Job, step: int, error: DivergenceError) -> None:
    """Leave a mark that the run has diverged: diverged.json. Every rank calls it; rank 0 writes.

    A disk that is full takes nothing from the error, which ends the run in any case.

    Args:
        job: The run.
        step: The number of optimizer steps done, that included which the error is about.
        error: What ends the run.
    """
    if job.groups.world.rank == 0:
        try:
            write_json({"step": step, "message": str(error)}, Path(job.config.train.output_dir) / DIVERGED_FILE)
        except FileError as unwritten:
            _LOGGER.warning("%s", unwritten)
    gather_objects(None, job.groups.world)  # a rank that ends lets launchers kill the others, rank 0 while it writes


def make_step_record(job: Job, step: int, result: StepResult, seconds: float, pace: Pace) -> StepRecord:
    """Return the line of metrics.jsonl for a step.

    Args:
        job: The run.
        step: The number of optimizer steps done.
        result: What the last of them gave.
        seconds: The wall time of the last of them.
        pace: What the ranks found about each other before it.
    """
    config, batch_tokens = job.config, job.derived.batch_tokens
    full, causal = (
        1e-12 * batch_tokens * model_flops_per_token(config.model, config.data.seq_length, causal=causal)
        for causal in (False, True)
    )
    fp16 = config.train.precision == "fp16"
    return StepRecord(
        step=step,
        tokens=step * batch_tokens,
        samples=step * config.train.global_batch_size,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate_at(step - 1, config.optimizer, config.train.steps),
        step_seconds=seconds,
        tokens_per_second=batch_tokens / seconds,
        model_tflops_per_second=full / seconds,
        model_tflops_per_second_causal=causal / seconds,
        memory_bytes=memory_bytes(job.device),
        memory_peak_bytes=memory_peak_bytes(job.device),
        sample_hash=format_sample_hash(result.sample_hash),
        loss_scale=result.loss_scale if fp16 else None,
        skipped=result.skipped if fp16 or result.skipped else None,
        straggler_ratio=pace.ratio,
        slowest_rank=pace.slowest,
    )


def make_validation_record(
    job: Job, step: int, *, loss: float, tokens: int, samples: int, seconds: float
) -> ValidationRecord:
    """Return the line of metrics.jsonl for a validation.

    Args:
        job: The run.
        step: The number of optimizer steps done before it.
        loss: The mean loss of the tokens, in nats.
        tokens: The number of tokens that have a loss.
        samples: The number of samples of data.valid that were read.
        seconds: The wall time of the validation.
    """
    return ValidationRecord(
        step=step,
        tokens=step * job.derived.batch_tokens,
        validation_loss=loss,
        validation_perplexity=math.exp(min(loss, 700.0)),
        validation_tokens=tokens,
        validation_seconds=seconds,
        validation_samples=samples,
    )

"""The loop: the only place where data, model, engine, checkpoint and report meet. Read it from the top down."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megalibi.checkpoint import load_checkpoint, prune, save_checkpoint
from megalibi.config import learning_rate_at
from megalibi.data.hashing import format_sample_hash
from megalibi.data.loader import Batch, Loader, ValidationLoader
from megalibi.engine.build import DeepSpeedEngine, build_engine
from megalibi.engine.step import StepResult, train_step
from megalibi.errors import UserError
from megalibi.evaluate.losses import validation_loss
from megalibi.log import get_logger
from megalibi.metrics.memory import memory_bytes, memory_peak_bytes
from megalibi.metrics.records import StepRecord, ValidationRecord
from megalibi.metrics.writers import Writers, build_writers
from megalibi.model import model_flops_per_token
from megalibi.parallel import describe_os_error, refusing_together
from megalibi.runtime.stop import DataError, StoppedError, StopRequest, check_together
from megalibi.train.job import (
    Job,
    Start,
    checkpoints_folder,
    describe_run,
    hold_run,
    is_due,
    open_loader,
    validation_is_due,
)

_LOGGER = get_logger(__name__)
_T = TypeVar("_T")


def train(job: Job) -> None:
    """Train from the start or the checkpoint to resume from, until the last step or a signal.

    Every rank calls it, with torch.distributed initialised.

    Args:
        job: The run, checked by check_run, and this rank's place in it.

    Raises:
        ConfigError: The folder is in use, a damaged checkpoint, a full disk, a token id past the vocabulary.
        FloatingPointError: The loss or the gradient is no number any more.
    """
    config, groups = job.config, job.groups
    stop = StopRequest()
    with hold_run(job) as start:
        engine = build_engine(config, job.derived, groups, job.device)
        first_step = 0 if start.checkpoint is None else load_checkpoint(engine, start.checkpoint, groups).step
        loader = open_loader(job)
        with refusing_together(groups.world, Path(config.train.output_dir)):  # rank 0 alone writes there
            if groups.world.rank == 0:
                describe_run(job, start)
            writers = build_writers(
                config.train.output_dir,
                rank=groups.world.rank,
                total_steps=config.train.steps,
                log_every_steps=config.train.log_every_steps,
                resumed_step=first_step,
                eval_samples=config.train.eval_samples,
            )
        with contextlib.closing(loader), writers:
            Loop(job, start, engine, loader, writers, stop, first_step).run()


class Loop:
    """Takes the steps; saves and validates where they are due.

    A checkpoint comes before the validation of its step: what a validation meets costs no step. All ranks leave the
    loop at the same place, whatever one of them met.

    Args:
        job: The run.
        start: Where it begins.
        engine: From build_engine, loaded.
        loader: Of the training data.
        writers: Of the records.
        stop: What a signal asks.
        first_step: Optimizer steps done.
    """

    def __init__(
        self,
        job: Job,
        start: Start,
        engine: DeepSpeedEngine,
        loader: Loader,
        writers: Writers,
        stop: StopRequest,
        first_step: int,
    ) -> None:
        self.job, self.start, self.engine = job, start, engine
        self.loader, self.writers, self.stop = loader, writers, stop
        self.first_step = first_step
        self.done = first_step
        own = start.checkpoint is None or start.checkpoint.parent == checkpoints_folder(job.config)
        self.saved = first_step if own else -1
        """Step of this run's newest checkpoint; 0: nothing needs to be saved yet; -1: it began with another run's."""
        self.confirmed = -1
        """The newest checkpoint after which this process saw a finite loss, so that its weights are good; -1: none."""
        self.loss_is_finite = True

    def run(self) -> None:
        """Go on until the last step, a signal, or what cannot be gone on from."""
        config = self.job.config
        try:
            if self.start.validation_is_missing:
                self.validate()
            elif self.done >= config.train.steps:
                _LOGGER.info("nothing to do: step %d of train.steps=%d is done", self.done, config.train.steps)
            while self.done < config.train.steps:
                self.take_step()
                if self.done == config.train.steps or is_due(self.done, config.checkpoint.every_steps):
                    self.save()
                if self.job.data.valid and validation_is_due(config, self.done):
                    self.validate()
        except StoppedError:
            self.save()
            reason = self.stop.signal_name or "a signal to another rank"
            _LOGGER.warning("stopped by %s after step %d, %s", reason, self.done, self.describe_saved())
        except DataError as error:
            try:
                self.save()
            except UserError as unsaved:
                raise DataError(f"{error}; and {unsaved}") from error
            raise DataError(
                f"{error}; stopped after step {self.done}, {self.describe_saved()} when the data is mended (other "
                "data wants checkpoint.accept_other_data=true)"
            ) from error

    def take_step(self) -> None:
        """Take one optimizer step and record it."""
        config = self.job.config
        began = time.perf_counter()
        samples_consumed = self.done * config.train.global_batch_size
        batches = self.read_together(lambda: self.loader.micro_batches(samples_consumed))
        result = take_step(self.job, self.engine, batches, self.done)
        self.done += 1
        self.writers.step(make_record(self.job, self.done, result, time.perf_counter() - began))
        check_finite(self.done, result, config.train.precision, self.describe_way_back())
        self.loss_is_finite = math.isfinite(result.loss)
        if self.loss_is_finite:
            self.confirm()

    def save(self) -> None:
        """Write a checkpoint of the steps done, unless there is one or the loss says that the weights are not good."""
        job = self.job
        if self.saved == self.done:
            return
        if not self.loss_is_finite:
            newest = f"step {self.saved} stays the newest" if self.saved > 0 else "there is none before it"
            message = f"no checkpoint of step {self.done}: its loss is not finite; {newest}"
            if self.done == job.config.train.steps:
                raise FloatingPointError(f"{message}, and the run ends here: lower optimizer.learning_rate")
            _LOGGER.warning("%s", message)
            return
        self.writers.sync()  # no checkpoint is on the disk before the lines of its steps
        save_checkpoint(
            self.engine,
            job.config,
            job.derived,
            job.data.identity,
            job.groups,
            folder=checkpoints_folder(job.config),
            step=self.done,
            run_id=self.start.run_id,
        )
        self.saved = self.done

    def describe_saved(self) -> str:
        """Return what the next start goes on from."""
        if self.saved < 1:
            return "nothing to save"
        is_new = self.saved == self.done > self.first_step
        what = "checkpoint saved" if is_new else f"the newest checkpoint is that of step {self.saved}"
        return f"{what}; the same command goes on"

    def describe_way_back(self) -> str:
        """Return what a user may do whose run has diverged."""
        if self.confirmed > 0:
            return f"go back to step {self.confirmed}, the newest checkpoint that is known to be good"
        return f"go back to a checkpoint before step {self.first_step}" if self.first_step else "start anew"

    def confirm(self) -> None:
        """The weights give a finite loss: the newest checkpoint is good, and older ones may go."""
        if self.confirmed == self.saved:
            return
        self.confirmed = self.saved
        if self.job.groups.world.rank == 0:
            try:
                prune(
                    checkpoints_folder(self.job.config),
                    self.job.config.checkpoint.keep,
                    also_later=self.saved > self.first_step,  # else it may just have gone back
                )
            except (OSError, UserError) as error:
                _LOGGER.warning("old checkpoints could not be deleted: %s", error)

    def validate(self) -> None:
        """Record the loss on the first ``train.eval_samples`` samples of data.valid, or on all if they are fewer."""
        began = time.perf_counter()
        loader = self.read_together(self.open_validation)
        self.engine.eval()
        try:
            loss, tokens = validation_loss(
                self.engine, self.read_batches(loader), groups=self.job.groups, device=self.job.device
            )
        finally:
            self.engine.train()
        self.writers.validation(
            ValidationRecord(
                step=self.done,
                tokens=self.done * self.job.derived.batch_tokens,
                validation_loss=loss,
                validation_perplexity=math.exp(min(loss, 700.0)),
                validation_tokens=tokens,
                validation_seconds=time.perf_counter() - began,
                validation_samples=loader.num_samples,
            )
        )
        if math.isfinite(loss):
            self.confirm()

    def open_validation(self) -> ValidationLoader:
        """Return what gives the batches of a validation, from the first one on."""
        config, groups = self.job.config, self.job.groups
        assert self.job.data.valid is not None
        return ValidationLoader(
            self.job.data.valid,
            num_samples=config.train.eval_samples,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=groups.data.rank,
            data_size=groups.data.size,
            document_mask=config.data.document_mask,
        )

    def read_batches(self, loader: ValidationLoader) -> Iterator[Batch]:
        """Yield the batches of a validation; a signal or what a rank cannot read ends it on all ranks."""
        batches = iter(loader)
        for _ in range(len(loader)):
            yield self.read_together(lambda: next(batches))

    def read_together(self, read: Callable[[], _T]) -> _T:
        """Return what this rank reads, if all ranks can read theirs and no signal asks for the end."""
        return read_together(read, self.job, self.stop)


def take_step(job: Job, engine: DeepSpeedEngine, batches: Sequence[Batch], done: int) -> StepResult:
    """Take the optimizer step of a run that has done so many; every rank must call it.

    Args:
        job: The run.
        engine: From build_engine.
        batches: This rank's micro batches of that step.
        done: Steps before it: the learning rate and the keys of dropout follow from their number.
    """
    config = job.config
    return train_step(
        engine,
        batches,
        groups=job.groups,
        device=job.device,
        learning_rate=learning_rate_at(done, config.optimizer, config.train.steps),
        seed=config.train.seed,
        samples_consumed=done * config.train.global_batch_size,
    )


def read_together(read: Callable[[], _T], job: Job, stop: StopRequest | None = None) -> _T:
    """Return what this rank reads, if all ranks can read theirs and none was asked to stop.

    Raises:
        DataError: On every rank: one could not.
        StoppedError: On every rank: one was asked to stop.
    """
    value, failure = None, None
    try:
        value = read()
    except UserError as error:
        failure = str(error)
    except OSError as error:
        failure = describe_os_error(error, Path("data"))
    check_together(job.groups, job.device, stop=stop, failure=failure)
    assert value is not None
    return value


def check_finite(step: int, result: StepResult, precision: str, way_back: str) -> None:
    """Stop a run whose loss or gradient is no number any more, before it saves that or repeats it for ever.

    Only fp16 has a remedy, to skip the step and scale the loss less; DeepSpeed skips such steps in any precision.

    Args:
        step: Optimizer steps done.
        result: Of the last one.
        precision: Of the run.
        way_back: What the error tells the user to do, with a lower learning rate.

    Raises:
        FloatingPointError: On every rank, for all have the same result.
    """
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    scales_less = precision == "fp16" and result.skipped and result.loss_scale > 1.0
    if finite or scales_less:
        return
    why = " with fp16's loss scale at its minimum of 1" if precision == "fp16" and result.skipped else ""
    raise FloatingPointError(
        f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}{why}: the run has diverged and "
        f"stops; {way_back}, with a lower optimizer.learning_rate"
    )


def make_record(job: Job, step: int, result: StepResult, seconds: float) -> StepRecord:
    """Return the line of metrics.jsonl for a step.

    Args:
        job: The run.
        step: Optimizer steps done.
        result: Of the last one.
        seconds: It took.
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
        skipped=result.skipped if fp16 else None,
    )

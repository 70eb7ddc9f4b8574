"""The training loop, where data, engine, evaluation, checkpoints and records meet. Read it from the top down."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megalibi.checkpoint import load_checkpoint
from megalibi.config import learning_rate_at
from megalibi.data.loader import Batch, Loader, ValidationLoader
from megalibi.engine.build import DeepSpeedEngine, build_engine
from megalibi.engine.step import StepResult, train_step
from megalibi.errors import DataError, DivergenceError, UserError
from megalibi.evaluate.losses import validation_loss
from megalibi.log import get_logger
from megalibi.metrics.writers import Writers, build_writers
from megalibi.parallel import refusing_together
from megalibi.runtime.stop import StoppedError, StopRequest, read_together
from megalibi.train.job import Job, is_due, open_loader, open_validation, validation_is_due
from megalibi.train.records import make_step_record, make_validation_record, record_start
from megalibi.train.resume import Start, hold_run
from megalibi.train.saving import Saves

_LOGGER = get_logger(__name__)
_T = TypeVar("_T")


def train(job: Job) -> bool:
    """Train from the start, or from the checkpoint to resume from; return whether the last step is done.

    It is not where a signal asked for the end. Every rank calls it, with torch.distributed initialised.

    Args:
        job: The run, checked by check_run, and this rank's place in it.

    Raises:
        DivergenceError: The loss or the gradient is not finite any more.
        UserError: The folder is in use, a checkpoint is damaged, the disk is full, or data cannot be read.
    """
    config, groups = job.config, job.groups
    stop = StopRequest()
    with hold_run(job) as start:
        engine = build_engine(config, job.derived, groups, job.device)
        first_step = 0 if start.checkpoint is None else load_checkpoint(engine, start.checkpoint, groups).step
        loader = open_loader(job)
        with refusing_together(groups.world, Path(config.train.output_dir)):  # rank 0 alone writes there
            if groups.world.rank == 0:
                record_start(job, start)
            writers = build_writers(
                config.train.output_dir,
                rank=groups.world.rank,
                total_steps=config.train.steps,
                log_every_steps=config.train.log_every_steps,
                resumed_step=first_step,
                eval_samples=config.train.eval_samples,
            )
        with contextlib.closing(loader), writers:
            return Loop(job, start, engine, loader, writers, stop, first_step).run()


class Loop:
    """Takes the steps; saves and validates where they are due.

    A checkpoint comes before the validation of its step, so that what a validation meets costs no step. All ranks leave
    the loop at the same place, whatever one of them met.

    Args:
        job: The run.
        start: Where it begins.
        engine: The engine from build_engine, loaded.
        loader: The reader of the training data.
        writers: The writers of the records.
        stop: Whether a signal has asked for the end.
        first_step: The number of optimizer steps done before this process.
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
        self.saves = Saves(job, start, engine, writers, first_step)
        self.done = first_step

    def run(self) -> bool:
        """Go on until the last step, a signal, or an error that ends the run; return whether the last step is done."""
        config = self.job.config
        try:
            if self.start.validation_is_missing:
                self.validate()
            elif self.done >= config.train.steps:
                _LOGGER.info("nothing to do: step %d of train.steps=%d is done", self.done, config.train.steps)
            while self.done < config.train.steps:
                self.take_next_step()
                if self.done == config.train.steps or is_due(self.done, config.checkpoint.every_steps):
                    self.saves.save(self.done, wait=self.done == config.train.steps)
                if self.job.data.valid and validation_is_due(config, self.done):
                    self.validate()
        except StoppedError:
            self.saves.save(self.done, wait=True)
            reason = self.stop.signal_name or "a signal to another rank"
            newest = self.saves.describe_newest(self.done)
            _LOGGER.warning("stopped by %s after step %d, %s", reason, self.done, newest)
            return False
        except DataError as error:  # of read_together, and so on every rank
            try:
                self.saves.save(self.done, wait=True)
            except UserError as unsaved:
                raise DataError(f"{error}; and {unsaved}") from error
            raise DataError(
                f"{error}; stopped after step {self.done}, {self.saves.describe_newest(self.done)} when the data is "
                "mended (other data wants checkpoint.accept_other_data=true)"
            ) from error
        except DivergenceError as error:  # on every rank, for all have the same loss
            try:
                self.saves.abandon()
            except UserError as unsaved:
                raise DivergenceError(f"{error}; and {unsaved}") from error
            raise
        return True

    def take_next_step(self) -> None:
        """Read a global batch, take the optimizer step and record it."""
        config = self.job.config
        began = time.perf_counter()
        samples_consumed = self.done * config.train.global_batch_size
        batches = self.read(lambda: self.loader.micro_batches(samples_consumed))
        result = take_step(self.job, self.engine, batches, self.done)
        self.done += 1
        self.writers.step(make_step_record(self.job, self.done, result, time.perf_counter() - began))
        check_finite(self.done, result, config.train.precision, self.saves.describe_way_back())
        self.saves.judge_step(result.loss)

    def validate(self) -> None:
        """Record the loss on the first ``train.eval_samples`` samples of data.valid, or on all if they are fewer."""
        began = time.perf_counter()
        loader = self.read(lambda: open_validation(self.job))
        self.engine.eval()
        try:
            loss, tokens = validation_loss(
                self.engine, self.read_batches(loader), groups=self.job.groups, device=self.job.device
            )
        finally:
            self.engine.train()
        seconds = time.perf_counter() - began
        self.writers.validation(
            make_validation_record(
                self.job, self.done, loss=loss, tokens=tokens, samples=loader.num_samples, seconds=seconds
            )
        )
        if math.isfinite(loss):
            self.saves.confirm()

    def read_batches(self, loader: ValidationLoader) -> Iterator[Batch]:
        """Yield the batches of a validation; a signal, or data that a rank cannot read, ends it on all ranks."""
        batches = iter(loader)
        for _ in range(len(loader)):
            yield self.read(lambda: next(batches))

    def read(self, read: Callable[[], _T]) -> _T:
        """Return what this rank reads, if all ranks can read theirs and no signal asks for the end.

        All ranks come here at the same place, so that it is here that they go on with a save in flight.
        """
        self.saves.poll()
        return read_together(read, self.job.groups, self.job.device, self.stop)


def take_step(job: Job, engine: DeepSpeedEngine, batches: Sequence[Batch], done: int) -> StepResult:
    """Take the next optimizer step of a run; every rank calls it.

    Args:
        job: The run.
        engine: The engine from build_engine.
        batches: This rank's micro batches of the step.
        done: The number of steps before it, from which its learning rate and the keys of its dropout follow.
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


def check_finite(step: int, result: StepResult, precision: str, way_back: str) -> None:
    """Stop a run whose loss or gradient is not finite any more, before it saves that or repeats it for ever.

    Only fp16 has a remedy, to skip the step and scale the loss less; DeepSpeed skips such steps in any precision.

    Args:
        step: The number of optimizer steps done.
        result: What the last of them gave.
        precision: The precision of the run.
        way_back: What the error tells the user to do, with a lower learning rate.

    Raises:
        DivergenceError: On every rank, for all have the same result.
    """
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    scales_less = precision == "fp16" and result.skipped and result.loss_scale > 1.0
    if finite or scales_less:
        return
    why = " with fp16's loss scale at its minimum of 1" if precision == "fp16" and result.skipped else ""
    raise DivergenceError(
        f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}{why}: the run has diverged and "
        f"stops; {way_back}, with a lower optimizer.learning_rate"
    )

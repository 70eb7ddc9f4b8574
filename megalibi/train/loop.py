"""The training loop, where data, engine, evaluation, checkpoints and records meet. Read it from the top down."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megalibi.checkpoint import find_left_out, load_checkpoint
from megalibi.config import learning_rate_at
from megalibi.config.sample_ranges import SampleRanges
from megalibi.data.loader import Batch, ValidationLoader
from megalibi.engine.build import DeepSpeedEngine, build_engine
from megalibi.engine.step import StepResult, train_step
from megalibi.errors import DataError, DivergenceError, UserError
from megalibi.evaluate.losses import validation_loss
from megalibi.log import get_logger
from megalibi.metrics.records import RollbackRecord
from megalibi.metrics.writers import Writers, build_writers
from megalibi.parallel import Stopwatch, compare_clocks, gather_objects, refusing_together
from megalibi.runtime.hang import Watchdog
from megalibi.runtime.stop import Aside, StoppedError, StopRequest, read_together
from megalibi.train.job import Job, is_due, open_loader, open_validation, validation_is_due
from megalibi.train.nonfinite import NonFiniteSteps
from megalibi.train.pace import Pace
from megalibi.train.records import make_step_record, make_validation_record, record_divergence, record_start
from megalibi.train.resume import Start, hold_run
from megalibi.train.saving import Saves
from megalibi.train.spikes import LossSpikes, open_spikes

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
    stop, run_dir = StopRequest(), Path(config.train.output_dir)
    limit_seconds = config.runtime.hang_timeout_seconds
    hosts = gather_objects(socket.gethostname(), groups.world)
    compare_clocks(groups.world, hosts)
    with hold_run(job) as start, Watchdog(limit_seconds, run_dir, groups.world, hosts) as watchdog:
        engine = build_engine(config, job.derived, groups, job.device)
        watchdog.mark()
        manifest = None if start.checkpoint is None else load_checkpoint(engine, start.checkpoint, groups)
        first_step = 0 if manifest is None else manifest.step
        with refusing_together(groups.world, run_dir):  # rank 0 alone writes there
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
        rollbacks = () if manifest is None else manifest.rollbacks
        loop = Loop(job, start, engine, writers, stop, watchdog, first_step, rollbacks, hosts)
        with writers, contextlib.closing(loop):
            return loop.run()


class Loop:
    """Takes the steps; saves and validates where they are due.

    A checkpoint comes before the validation of its step, so that what a validation meets costs no step. All ranks leave
    the loop at the same place, whatever one of them met.

    Args:
        job: The run.
        start: Where it begins.
        engine: The engine from build_engine, loaded.
        writers: The writers of the records.
        stop: Whether a signal has asked for the end.
        watchdog: Told of the progress of this rank.
        first_step: The number of optimizer steps done before this process.
        rollbacks: The loss spikes that took the run back before it.
        hosts: The host of each rank.
    """

    def __init__(
        self,
        job: Job,
        start: Start,
        engine: DeepSpeedEngine,
        writers: Writers,
        stop: StopRequest,
        watchdog: Watchdog,
        first_step: int,
        rollbacks: tuple[RollbackRecord, ...],
        hosts: Sequence[str],
    ) -> None:
        self.job, self.start, self.engine = job, start, engine
        self.writers, self.stop, self.watchdog = writers, stop, watchdog
        self.saves = Saves(job, start, engine, writers, first_step, rollbacks)
        self.nonfinite = NonFiniteSteps(job)
        self.spikes = open_spikes(job)
        self.pace = Pace(
            job.groups,
            hosts,
            every_steps=job.config.train.log_every_steps,
            slow_ratio=job.config.runtime.slow_rank_ratio,
            first_step=first_step,
        )
        self.done = first_step
        self.leave_out(rollbacks)

    def leave_out(self, rollbacks: tuple[RollbackRecord, ...]) -> None:
        """Read the data without the samples that the configuration and these loss spikes leave out."""
        self.rollbacks = rollbacks
        self.left_out = find_left_out(self.job.config, rollbacks)
        self.loader = open_loader(self.job, rollbacks)

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.loader.close()

    def run(self) -> bool:
        """Go on until the last step, a signal, or an error that ends the run; return whether the last step is done."""
        config = self.job.config
        try:
            if self.start.validation_is_missing:
                self.validate()
            elif self.done >= config.train.steps:
                _LOGGER.info("nothing to do: step %d of train.steps=%d is done", self.done, config.train.steps)
            while self.done < config.train.steps:
                if not self.take_next_step():
                    continue
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
            record_divergence(self.job, self.done, error)
            try:
                self.saves.abandon()
            except UserError as unsaved:
                raise DivergenceError(f"{error}; and {unsaved}") from error
            raise
        return True

    def take_next_step(self) -> bool:
        """Read a global batch, take the optimizer step and record it; return whether it stays."""
        config = self.job.config
        began = time.perf_counter()
        samples_consumed = self.done * config.train.global_batch_size
        batches = self.read(
            lambda: self.pace.time_read(lambda: self.loader.micro_batches(samples_consumed)), aside=self.pace
        )
        result = take_step(self.job, self.engine, batches, self.done, forward=self.pace.forward)
        self.done += 1
        self.watchdog.mark(self.done)
        self.pace.end_step()
        seconds = time.perf_counter() - began
        self.writers.step(make_step_record(self.job, self.done, result, seconds, self.pace))
        is_good = self.nonfinite.judge(self.done, result, self.left_out, self.saves.describe_way_back())
        if self.spikes is not None and self.spikes.any_spike(self.done, result.loss):
            self.roll_back(self.spikes, result.loss)
            return False
        self.saves.judge_weights(is_good)
        return True

    def roll_back(self, spikes: LossSpikes, loss: float) -> None:
        """Go back to the newest good checkpoint, and leave out the samples of the steps since, the last one's included.

        Raises:
            DivergenceError: On every rank: there is no such checkpoint, or the run has gone back too often.
        """
        config, groups, spike_step = self.job.config, self.job.groups, self.done
        good = self.saves.find_good()
        spike = f"step {spike_step} has loss {loss:.4f}, a spike above {spikes.find_limit():.4f}"
        if good is None or len(self.rollbacks) >= config.train.max_rollbacks:
            why = "no checkpoint to go back to" if good is None else f"train.max_rollbacks={config.train.max_rollbacks}"
            start = self.saves.next_start
            raise DivergenceError(
                f"{spike}, and there is {why}: the run stops; 'data.skip={self.left_out | self.find_batches(start)}' "
                f"leaves out the samples since step {start} at the next start"
            )
        step, checkpoint = good
        left_out = ",".join(self.find_batches(step).spell())
        record = RollbackRecord(step=step, rolled_back_from=spike_step, spike_loss=loss, left_out=left_out)
        if groups.world.rank == 0:
            _LOGGER.warning(
                "%s: goes back to %s and leaves out the samples %s", spike, checkpoint.name, record.left_out
            )
        self.loader.close()
        self.watchdog.mark()
        load_checkpoint(self.engine, checkpoint, groups)
        self.leave_out((*self.rollbacks, record))
        self.done = step
        spikes.go_back(step)
        self.saves.restart(step, self.rollbacks)
        self.writers.go_back(record)

    def find_batches(self, step: int) -> SampleRanges:
        """Return the numbers of the samples of the steps after this one."""
        batch_size = self.job.config.train.global_batch_size
        return self.left_out.kept(step * batch_size, (self.done - step) * batch_size)

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

    def read(self, read: Callable[[], _T], *, aside: Aside | None = None) -> _T:
        """Return what this rank reads, if all ranks can read theirs and no signal asks for the end.

        All ranks come here at the same place, so that it is here that they go on with a save in flight, and tell each
        other something aside.
        """
        self.watchdog.mark()
        self.saves.poll()

        def read_own() -> _T:
            value = read()
            self.watchdog.mark()  # a rank that still reads is behind the others, which wait for it
            return value

        return read_together(read_own, self.job.groups, self.job.device, self.stop, aside)


def take_step(
    job: Job, engine: DeepSpeedEngine, batches: Sequence[Batch], done: int, *, forward: Stopwatch | None = None
) -> StepResult:
    """Take the next optimizer step of a run; every rank calls it.

    Args:
        job: The run.
        engine: The engine from build_engine.
        batches: This rank's micro batches of the step.
        done: The number of steps before it, from which its learning rate and the keys of its dropout follow.
        forward: Measures the forward passes; None: nothing does.
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
        forward=forward,
    )

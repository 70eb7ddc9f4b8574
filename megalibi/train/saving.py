"""The checkpoints of a run in progress: when one may be written, which are known to be good, and which may go."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from megalibi.checkpoint import CheckpointSaver, SavedRun, checkpoint_name, prune
from megalibi.engine.build import DeepSpeedEngine
from megalibi.errors import DivergenceError, FileError, UserError
from megalibi.log import get_logger
from megalibi.metrics.records import RollbackRecord
from megalibi.metrics.writers import Writers
from megalibi.train.job import Job, checkpoints_folder
from megalibi.train.resume import Start

_LOGGER = get_logger(__name__)


class Saves:
    """Writes the checkpoints of a run, and deletes old ones when a newer one is known to be good.

    A checkpoint is good when a loss that was computed with its weights is finite. One may be in flight, which is being
    written while the training goes on; before the next is begun, and before the run ends, it is waited for.

    Args:
        job: The run.
        start: Where it begins.
        engine: The engine from build_engine, loaded.
        writers: The writers of the records, which are on the disk before the checkpoint of their steps.
        first_step: The number of optimizer steps done before this process.
        rollbacks: The loss spikes that took the run back so far.
    """

    def __init__(
        self,
        job: Job,
        start: Start,
        engine: DeepSpeedEngine,
        writers: Writers,
        first_step: int,
        rollbacks: tuple[RollbackRecord, ...] = (),
    ) -> None:
        self.job, self.writers = job, writers
        self.first_step = first_step
        self.folder = checkpoints_folder(job.config)
        self.saver = CheckpointSaver(
            SavedRun(
                engine=engine,
                config=job.config,
                derived=job.derived,
                data=job.data.identity,
                groups=job.groups,
                folder=self.folder,
                run_id=start.run_id,
                rollbacks=rollbacks,
            )
        )
        self.asynchronous = job.config.checkpoint.asynchronous
        """Whether to save in the background; None: the first save finds out whether there is memory for it."""
        self.start = start.checkpoint
        own = start.checkpoint is None or start.checkpoint.parent == self.folder
        self.saved = first_step if own else -1
        """The step of this run's newest checkpoint; 0: there is nothing to save yet; -1: it began with another's."""
        self.confirmed = -1
        """The step of the newest checkpoint that this process knows to be good; -1 if it knows none."""
        self.pending_is_good = False
        """Whether the weights of the save in flight gave a finite loss."""
        self.loss_is_finite = True

    def save(self, step: int, *, wait: bool = False) -> None:
        """Write a checkpoint of the steps done, unless there is one or the loss says that the weights are not good.

        Args:
            step: The number of steps done.
            wait: Return when it is complete. Without it, it may be written in the background.

        Raises:
            DivergenceError: The weights are not good, and the run ends here.
            UserError: On every rank, if a rank could not write this one; or the one in flight, unless this one is
                waited for and can be written.
        """
        try:
            self.finish()
        except UserError as error:
            if not wait:
                raise
            _LOGGER.warning("%s", error)
            with contextlib.suppress(UserError):
                self.save_next(step, wait=True)
            if self.saved != step:
                raise
        else:
            self.save_next(step, wait=wait)

    def save_next(self, step: int, *, wait: bool) -> None:
        """Write a checkpoint as save() does, where no save is in flight."""
        if self.saved == step:
            return
        if not self.loss_is_finite:
            newest = f"step {self.saved} stays the newest" if self.saved > 0 else "there is none before it"
            message = f"no checkpoint of step {step}: its loss is not finite; {newest}"
            if step == self.job.config.train.steps:
                raise DivergenceError(f"{message}, and the run ends here: lower optimizer.learning_rate")
            _LOGGER.warning("%s", message)
            return
        self.writers.sync()  # no checkpoint is on the disk before the lines of its steps
        if wait or not self.is_asynchronous() or not self.begin(step):
            self.saver.save(step)
            self.note_saved(step)

    def begin(self, step: int) -> bool:
        """Begin to save in the background; return False if a rank cannot and the user did not ask for it."""
        try:
            self.saver.begin(step)
        except FileError as error:
            if self.job.config.checkpoint.asynchronous:
                raise
            _LOGGER.warning("%s; from here on the training waits for checkpoints", error)
            self.asynchronous = False
            return False
        self.pending_is_good = False
        return True

    def is_asynchronous(self) -> bool:
        """Return whether to save in the background; the first call finds out, and says why not."""
        if self.asynchronous is None:
            lack = self.saver.explain_lack_of_memory()
            self.asynchronous = lack is None
            if lack is not None:
                _LOGGER.info(
                    "checkpoints are written while the training waits: %s (checkpoint.asynchronous=true does not ask)",
                    lack,
                )
        return self.asynchronous

    def poll(self) -> None:
        """Go on with the save in flight, if there is one; every rank calls it between two steps.

        Raises:
            UserError: On every rank, if a rank could not write it.
        """
        self.take(self.saver.poll())

    def finish(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            UserError: On every rank, if a rank could not write it.
        """
        if self.saver.pending_step is not None:
            began = time.perf_counter()
            step = self.saver.finish()
            _LOGGER.info("waited %.1f s for the checkpoint of step %d to be written", time.perf_counter() - began, step)
            self.take(step)

    def abandon(self) -> None:
        """Give up the save in flight, if its weights gave no good loss and it is not being committed already.

        Raises:
            UserError: On every rank, if it was waited for and a rank could not write it.
        """
        step = self.saver.pending_step
        if self.pending_is_good or not self.saver.abandon():
            self.finish()
        else:
            _LOGGER.warning("the checkpoint of step %d is given up: its weights gave no good loss", step)

    @property
    def next_start(self) -> int:
        """The step from which the next start goes on."""
        return self.saved if self.saved >= 0 else self.first_step

    def find_good(self) -> tuple[int, Path] | None:
        """Return the newest checkpoint that is known to be good, with its step; None: there is none.

        The save in flight is waited for, or given up if nothing has shown that it is good.

        Raises:
            UserError: On every rank, if it was waited for and a rank could not write it.
        """
        self.abandon()
        if self.confirmed > 0:
            return self.confirmed, self.folder / checkpoint_name(self.confirmed)
        return None if self.saved >= 0 or self.start is None else (self.first_step, self.start)

    def restart(self, step: int, rollbacks: tuple[RollbackRecord, ...]) -> None:
        """Save a step anew that the engine went back to, so that the next start knows what is left out since.

        Later checkpoints stay until the next save, as where a user goes back.

        Args:
            step: The number of optimizer steps done.
            rollbacks: The loss spikes that took the run back so far.

        Raises:
            UserError: On every rank, if a rank could not write it.
        """
        self.saver.note_rollbacks(rollbacks)
        self.first_step, self.saved = step, -1
        self.loss_is_finite = True
        self.save(step, wait=True)
        self.confirmed = step

    def take(self, step: int | None) -> None:
        """Take the step whose checkpoint has become complete, if one has."""
        if step is not None:
            self.note_saved(step)
            if self.pending_is_good:
                self.confirm()

    def note_saved(self, step: int) -> None:
        """Note that the checkpoint of a step is complete."""
        self.saved = step
        if self.job.groups.world.rank == 0 and self.job.failures_file is not None and step > self.first_step:
            try:
                self.job.failures_file.unlink(missing_ok=True)
            except OSError as error:
                _LOGGER.warning("%s cannot be deleted: %s", self.job.failures_file, error)

    def judge_weights(self, gave_finite_loss: bool) -> None:
        """Take whether the training loss of a step, which was computed with the weights before it, is finite."""
        self.loss_is_finite = gave_finite_loss
        if self.loss_is_finite:
            self.confirm()

    def confirm(self) -> None:
        """Note that the weights gave a finite loss: the newest checkpoint is good, and older ones may go."""
        self.pending_is_good = True
        if self.saver.pending_step is not None or self.confirmed == self.saved:
            return  # what is in flight would be taken for a leftover; it confirms itself when it is complete
        self.confirmed = self.saved
        if self.job.groups.world.rank == 0:
            try:
                prune(
                    self.folder,
                    self.job.config.checkpoint.keep,
                    also_later=self.saved > self.first_step,  # else the run may just have gone back
                )
            except (OSError, UserError) as error:
                _LOGGER.warning("old checkpoints could not be deleted: %s", error)

    def describe_newest(self, step: int) -> str:
        """Return what the next start goes on from, after so many steps."""
        if self.saved < 1:
            return "nothing to save"
        is_new = self.saved == step > self.first_step
        what = "checkpoint saved" if is_new else f"the newest checkpoint is that of step {self.saved}"
        return f"{what}; the same command goes on"

    def describe_way_back(self) -> str:
        """Return what a user may do whose run has diverged; the save in flight is waited for if it is good."""
        pending = self.saver.pending_step
        good = pending if pending is not None and self.pending_is_good else self.confirmed
        if good > 0:
            return f"go back to step {good}, the newest checkpoint that is known to be good"
        return f"go back to a checkpoint before step {self.first_step}" if self.first_step else "start anew"

"""The checkpoints of a run in progress: when one may be written, which are known to be good, and which may go."""

from __future__ import annotations

import math

from megalibi.checkpoint import prune, save_checkpoint
from megalibi.engine.build import DeepSpeedEngine
from megalibi.errors import DivergenceError, UserError
from megalibi.log import get_logger
from megalibi.metrics.writers import Writers
from megalibi.train.job import Job, checkpoints_folder
from megalibi.train.resume import Start

_LOGGER = get_logger(__name__)


class Saves:
    """Writes the checkpoints of a run, and deletes old ones when a newer one is known to be good.

    A checkpoint is good when a loss that was computed with its weights is finite.

    Args:
        job: The run.
        start: Where it begins.
        engine: The engine from build_engine, loaded.
        writers: The writers of the records, which are on the disk before the checkpoint of their steps.
        first_step: The number of optimizer steps done before this process.
    """

    def __init__(self, job: Job, start: Start, engine: DeepSpeedEngine, writers: Writers, first_step: int) -> None:
        self.job, self.start, self.engine, self.writers = job, start, engine, writers
        self.first_step = first_step
        own = start.checkpoint is None or start.checkpoint.parent == checkpoints_folder(job.config)
        self.saved = first_step if own else -1
        """The step of this run's newest checkpoint; 0: there is nothing to save yet; -1: it began with another's."""
        self.confirmed = -1
        """The step of the newest checkpoint that this process knows to be good; -1 if it knows none."""
        self.loss_is_finite = True

    def save(self, step: int) -> None:
        """Write a checkpoint of the steps done, unless there is one or the loss says that the weights are not good.

        Raises:
            DivergenceError: The weights are not good, and the run ends here.
            UserError: On every rank, if a rank could not write.
        """
        job = self.job
        if self.saved == step:
            return
        if not self.loss_is_finite:
            newest = f"step {self.saved} stays the newest" if self.saved > 0 else "there is none before it"
            message = f"no checkpoint of step {step}: its loss is not finite; {newest}"
            if step == job.config.train.steps:
                raise DivergenceError(f"{message}, and the run ends here: lower optimizer.learning_rate")
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
            step=step,
            run_id=self.start.run_id,
        )
        self.saved = step

    def judge_step(self, loss: float) -> None:
        """Take the training loss of a step, which was computed with the weights before it."""
        self.loss_is_finite = math.isfinite(loss)
        if self.loss_is_finite:
            self.confirm()

    def confirm(self) -> None:
        """Note that the weights gave a finite loss: the newest checkpoint is good, and older ones may go."""
        if self.confirmed == self.saved:
            return
        self.confirmed = self.saved
        if self.job.groups.world.rank == 0:
            try:
                prune(
                    checkpoints_folder(self.job.config),
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
        """Return what a user may do whose run has diverged."""
        if self.confirmed > 0:
            return f"go back to step {self.confirmed}, the newest checkpoint that is known to be good"
        return f"go back to a checkpoint before step {self.first_step}" if self.first_step else "start anew"

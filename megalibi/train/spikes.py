"""Loss spikes: when a training loss is one, by ``train.on_spike``.

A loss far above the losses before it comes of a batch that is no text, or of a step that went wrong. The remedy of
arXiv:2204.02311 (section 5.1), to go back to a checkpoint and to leave out the batches since, serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist

from megalibi.metrics.records import read_last_losses
from megalibi.parallel import all_reduce_raw, gather_objects
from megalibi.train.job import Job


class LossSpikes:
    """Judges each loss by those of the last ``train.spike_window`` steps. A spike is not one of them.

    Args:
        job: The run.
        losses: Steps and losses before this process: a run that resumes judges as one that never stopped.
    """

    def __init__(self, job: Job, losses: Iterable[tuple[int, float]]) -> None:
        self.job = job
        # All of them, for a run that goes back needs those before the ones that it takes back.
        self.losses = [(step, loss) for step, loss in losses if math.isfinite(loss)]

    def any_spike(self, step: int, loss: float) -> bool:
        """Take the loss of a step; return whether it is a spike to any rank, the same on all.

        Losses may differ between ranks in the last digit, which could be the one that decides.
        """
        is_spike = self.is_spike(step, loss)
        found = torch.tensor(int(is_spike), device=self.job.device)
        return bool(all_reduce_raw(found, self.job.groups.world, dist.ReduceOp.MAX).item())

    def is_spike(self, step: int, loss: float) -> bool:
        """Take the loss of a step; return whether it is a spike to this rank."""
        limit = self.find_limit()
        if limit is not None and math.isfinite(loss) and loss > limit:
            return True
        if math.isfinite(loss):
            self.losses.append((step, loss))
        return False

    def find_limit(self) -> float | None:
        """Return the loss above which the next one is a spike; None: there are too few losses to say."""
        train = self.job.config.train
        recent = [loss for _, loss in self.losses[-train.spike_window :]]
        if len(recent) < train.spike_window:
            return None
        return float(np.mean(recent) + train.spike_deviations * np.std(recent))

    def go_back(self, step: int) -> None:
        """Forget the losses of the steps after this one."""
        self.losses = [(at, loss) for at, loss in self.losses if at <= step]


def open_spikes(job: Job) -> LossSpikes | None:
    """Return what judges the losses of a run, once its metrics.jsonl is cut to where it begins; None: nothing does.

    Every rank calls it.
    """
    train = job.config.train
    if train.on_spike == "none":
        return None
    losses = read_last_losses(train.output_dir, train.spike_window) if job.groups.world.rank == 0 else []
    return LossSpikes(job, gather_objects(losses, job.groups.world)[0])

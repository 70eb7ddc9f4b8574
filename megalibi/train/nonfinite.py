"""A loss or a gradient that is not finite: what is said of its batch, and whether the run stops or goes on.

The step has left the weights as they were on every rank by then (``engine.step``), so that all that is to be decided
here is what comes next. Every rank has the same loss and norm, and decides the same.
"""

from __future__ import annotations

import math
import socket

from megalibi.config.sample_ranges import SampleRanges
from megalibi.engine.step import StepResult
from megalibi.errors import DivergenceError
from megalibi.log import get_logger
from megalibi.parallel import gather_objects
from megalibi.train.job import Job

_LOGGER = get_logger(__name__)
_MAX_SHOWN = 4
"""The most micro batches that a message names."""


def check_finite(step: int, result: StepResult, precision: str, way_back: str, found: str = "") -> None:
    """Stop a run whose loss or gradient is not finite any more, before it saves that or repeats it for ever.

    Args:
        step: The number of optimizer steps done.
        result: What the last of them gave.
        precision: The precision of the run.
        way_back: What the error tells the user to do, with a lower learning rate.
        found: What is known of the batch, put at the end.

    Raises:
        DivergenceError: On every rank, for all have the same result.
    """
    if is_usable(result, precision):
        return
    why = " with fp16's loss scale at its minimum of 1" if precision == "fp16" and result.skipped else ""
    raise DivergenceError(
        f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}{why}: the run has diverged and "
        f"stops; {way_back}, with a lower optimizer.learning_rate{found}"
    )


def is_usable(result: StepResult, precision: str) -> bool:
    """Return whether a step's loss and gradient are finite, or it will be tried again with a smaller loss scale.

    Only fp16 has that remedy; DeepSpeed skips steps that are not finite in any precision.

    Args:
        result: What the step gave.
        precision: The precision of the run.
    """
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    return finite or (precision == "fp16" and result.skipped and result.loss_scale > 1.0)


class NonFiniteSteps:
    """Judges each step by ``train.on_nonfinite``; every rank calls it.

    Args:
        job: The run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.in_a_row = 0

    def judge(self, step: int, result: StepResult, left_out: SampleRanges, way_back: str) -> bool:
        """Take what a step gave. Nothing is exchanged between the ranks unless it is not finite.

        Args:
            step: The number of optimizer steps done, this one included.
            result: What it gave.
            left_out: The numbers of the samples that the run leaves out.
            way_back: What a user may do to go back, if the run stops.

        Returns:
            Whether the weights before the step gave a finite loss, if not for each sample then for some.

        Raises:
            DivergenceError: On every rank: the run stops.
        """
        train = self.job.config.train
        if is_usable(result, train.precision):
            self.in_a_row = 0
            return math.isfinite(result.loss)
        batch_size = train.global_batch_size
        batch = left_out.kept((step - 1) * batch_size, batch_size)
        origin, num_bad = self._find_origin(result, left_out)
        remedy = f"'data.skip={left_out | batch}'"
        self.in_a_row += 1
        if train.on_nonfinite == "stop" or self.in_a_row > train.max_consecutive_skips:
            row = f"; steps in a row: {self.in_a_row}" if self.in_a_row > 1 else ""
            found = f", or, to leave its batch out, with {remedy}; {origin}{row}"
            check_finite(step, result, train.precision, way_back, found)
        if self.job.groups.world.rank > 0:
            return num_bad < batch_size
        _LOGGER.warning(
            "step %d has loss %s and gradient norm %s: no rank changes its weights, and the run goes on with the next "
            "batch (%d of train.max_consecutive_skips=%d in a row); %s; %s leaves the batch out",
            step,
            result.loss,
            result.grad_norm,
            self.in_a_row,
            train.max_consecutive_skips,
            origin,
            remedy,
        )
        return num_bad < batch_size

    def _find_origin(self, result: StepResult, left_out: SampleRanges) -> tuple[str, int]:
        """Return which ranks, hosts and samples have a loss that is not finite, and the number of these samples."""
        groups = self.job.groups
        numbers = [(index, left_out.number_at(position)) for index, position in result.bad_samples]
        found = gather_objects((groups.tensor.rank, socket.gethostname(), numbers), groups.world)
        bad = [(rank, host, numbers) for rank, (tensor_rank, host, numbers) in enumerate(found)
               if tensor_rank == 0 and numbers]  # fmt: skip
        if not bad:
            return "the losses of all its samples are finite, so that it arose in the backward pass", 0
        num_bad = sum(len(numbers) for _, _, numbers in bad)
        if num_bad == self.job.config.train.global_batch_size:
            return "no sample of any rank has a finite loss, so that the weights are at fault, not the batch", num_bad
        places = [
            f"rank {rank} on {host} (micro batch {index}: sample "
            f"{' and '.join(str(number) for at, number in numbers if at == index)})"
            for rank, host, numbers in bad
            for index in sorted({index for index, _ in numbers})
        ]
        more = f" and {len(places) - _MAX_SHOWN} more micro batches" if len(places) > _MAX_SHOWN else ""
        return f"it arose on {', '.join(places[:_MAX_SHOWN])}{more}", num_bad

"""The progress of a run on the terminal, or as lines in a log."""

from __future__ import annotations

import math
from collections import deque

from rich.console import Console

from megalibi.console import Progress
from megalibi.metrics.records import RollbackRecord, StepRecord, ValidationRecord
from megalibi.units import format_bytes, format_count, format_duration

# The time left follows from the mean over so many steps: long enough to be steady, short enough to follow a change.
_RECENT_STEPS = 50


class ConsoleWriter:
    """Shows progress: a bar on a terminal, a plain line every few steps elsewhere.

    Args:
        total_steps: The step the run ends at.
        log_every_steps: Plain lines are printed at its multiples, at the first step and at the last.
        resumed_step: The step the run resumes from.
        eval_samples: Number of samples that a validation is asked to read; its line says so if there were fewer.
        console: The console to write to; None: standard output.
    """

    name = "the console"

    def __init__(
        self,
        *,
        total_steps: int,
        log_every_steps: int,
        resumed_step: int = 0,
        eval_samples: int = 0,
        console: Console | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._log_every_steps = log_every_steps
        self._first_step = resumed_step + 1
        self._eval_samples = eval_samples
        self._recent_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._console = console or Console(highlight=False, soft_wrap=True)
        # Its lines are printed here, because they come by steps and not by seconds.
        self._progress = Progress(self._console, line_every_seconds=math.inf, stays=True)
        self._progress.start()
        self._progress.show("", "first step ...", done=resumed_step, total=total_steps)

    def step(self, record: StepRecord) -> None:
        """Move the bar, or print a line if one is due at this step."""
        self._recent_seconds.append(record.step_seconds)
        if self._console.is_terminal:
            self._progress.show("", self._brief(record), done=record.step, total=self._total_steps)
        elif record.step % self._log_every_steps == 0 or record.step in (self._first_step, self._total_steps):
            self._progress.say(self._line(record))

    def validation(self, record: ValidationRecord) -> None:
        """Print a line, which stays above the bar on a terminal."""
        samples, few = record.validation_samples, ""
        if samples is not None and samples < self._eval_samples:
            few = f" | {samples} samples, all of data.valid: train.eval_samples={self._eval_samples}"
        self._progress.say(
            f"step {record.step}/{self._total_steps} | validation loss {record.validation_loss:.4f} | "
            f"perplexity {record.validation_perplexity:.2f} | {format_count(record.validation_tokens)} tokens | "
            f"{format_duration(record.validation_seconds)}{few}"
        )

    def go_back(self, record: RollbackRecord) -> None:
        """Print a line, which stays above the bar on a terminal."""
        self._progress.say(
            f"step {record.rolled_back_from}/{self._total_steps} | loss spike {record.spike_loss:.4f} | goes on from "
            f"step {record.step} without the samples {record.left_out}"
        )

    def sync(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Stop the bar and show the cursor again."""
        self._progress.close()

    def _seconds_left(self, record: StepRecord) -> float:
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        return mean_seconds * (self._total_steps - record.step)

    def _brief(self, record: StepRecord) -> str:
        return (
            f"{record.step / self._total_steps:.0%} {record.step}/{self._total_steps} | loss {record.loss:.4f} | "
            f"{format_count(record.tokens_per_second)} tokens/s | {format_duration(self._seconds_left(record))} left"
        )

    def _line(self, record: StepRecord) -> str:
        parts = [
            f"step {record.step}/{self._total_steps}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3f}",
            f"lr {record.learning_rate:.2e}",
            f"{format_count(record.tokens_per_second)} tokens/s",
            f"{record.model_tflops_per_second:.2f} TFLOP/s",
            format_bytes(record.memory_bytes),
            f"{format_duration(self._seconds_left(record))} left",
        ]
        if record.loss_scale is not None:
            parts.insert(4, f"loss scale {record.loss_scale:.0f}")
        if record.skipped:
            parts.insert(1, "skipped")
        return " | ".join(parts)

"""Where the records of a run go: metrics.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megalibi.errors import UserError
from megalibi.log import get_logger
from megalibi.metrics.jsonl import DROPPED_FILE, JsonlWriter
from megalibi.metrics.records import METRICS_FILE, StepRecord, ValidationRecord
from megalibi.units import format_bytes, format_count, format_duration

_LOGGER = get_logger(__name__)

TENSORBOARD_FOLDER = "tensorboard"

# Steps whose mean time gives the time left: long enough to be steady, short enough to follow a change.
_RECENT_STEPS = 50


class Writer(Protocol):
    """Something that records go to."""

    @property
    def name(self) -> str:
        """How a warning names it."""

    def step(self, record: StepRecord) -> None:
        """Take the record of one step."""

    def validation(self, record: ValidationRecord) -> None:
        """Take the record of one validation."""

    def sync(self) -> None:
        """Put on the disk what was taken so far."""

    def close(self) -> None:
        """Finish; the writer is not used afterwards."""


class TensorBoardWriter:
    """Writes scalars by step for TensorBoard.

    Args:
        folder: Where the event files go.
        resumed_step: The step the run resumes from: TensorBoard hides what an earlier process wrote beyond it.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path | str, *, resumed_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds to import, on one rank only

        _silence_its_thread()
        self._events = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of one step."""
        scalars = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
            "train/loss_scale": record.loss_scale,
            "speed/step_seconds": record.step_seconds,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/model_tflops_per_second": record.model_tflops_per_second,
            "speed/model_tflops_per_second_causal": record.model_tflops_per_second_causal,
            "memory/bytes": record.memory_bytes,
            "memory/peak_bytes": record.memory_peak_bytes,
        }
        for tag, value in scalars.items():
            if value is not None:
                self._events.add_scalar(tag, value, record.step)

    def validation(self, record: ValidationRecord) -> None:
        """Write the scalars of one validation."""
        self._events.add_scalar("validation/loss", record.validation_loss, record.step)
        self._events.add_scalar("validation/perplexity", record.validation_perplexity, record.step)

    def sync(self) -> None:
        """Write out what is buffered."""
        self._events.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        self._events.close()


def _silence_its_thread() -> None:
    """Keep the traceback of TensorBoard's thread off the terminal: the next call raises the same error, and says it."""
    say = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            say(failed)

    threading.excepthook = hook


class ConsoleWriter:
    """Shows progress: a bar on a terminal, a plain line every few steps elsewhere.

    Args:
        total_steps: The step the run ends at.
        log_every_steps: Plain lines are printed at multiples of it, at the first step and at the last.
        resumed_step: The step the run resumes from.
        eval_samples: How many samples a validation shall read; a line says so if there were fewer.
        console: Where to; standard output if None.
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
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task("first step ...", total=total_steps, completed=resumed_step)
            self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Move the bar, or print a line if the step is due one."""
        self._recent_seconds.append(record.step_seconds)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, description=self._brief(record))
        elif record.step % self._log_every_steps == 0 or record.step in (self._first_step, self._total_steps):
            self._print(self._line(record))

    def validation(self, record: ValidationRecord) -> None:
        """Print a line; on a terminal it stays above the bar."""
        samples, few = record.validation_samples, ""
        if samples is not None and samples < self._eval_samples:
            few = f" | {samples} samples, all of data.valid: train.eval_samples={self._eval_samples}"
        self._print(
            f"step {record.step}/{self._total_steps} | validation loss {record.validation_loss:.4f} | "
            f"perplexity {record.validation_perplexity:.2f} | {format_count(record.validation_tokens)} tokens | "
            f"{format_duration(record.validation_seconds)}{few}"
        )

    def sync(self) -> None:
        """Do nothing: what was shown was shown."""

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, record: StepRecord) -> float:
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        return mean_seconds * (self._total_steps - record.step)

    def _brief(self, record: StepRecord) -> str:
        return (
            f"{record.step}/{self._total_steps} | loss {record.loss:.4f} | "
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


class Writers:
    """Several writers as one; closes them at the end of a ``with`` block.

    A record is not worth a run: a writer that fails is named in one warning, with the reason, and then left out.

    Args:
        writers: Who gets every record; none on ranks that only take part.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = list(writers)

    def step(self, record: StepRecord) -> None:
        """Hand the record of one step to every writer."""
        self._each(lambda writer: writer.step(record))

    def validation(self, record: ValidationRecord) -> None:
        """Hand the record of one validation to every writer."""
        self._each(lambda writer: writer.validation(record))

    def sync(self) -> None:
        """Have every writer put on the disk what it took."""
        self._each(lambda writer: writer.sync())

    def close(self) -> None:
        """Close every writer.

        Raises:
            ConfigError: metrics.jsonl lacks lines.
        """
        lost: list[UserError] = []

        def close(writer: Writer) -> None:
            try:
                writer.close()
            except UserError as error:
                lost.append(error)

        self._each(close)
        if lost:
            raise lost[0]

    def _each(self, work: Callable[[Writer], None]) -> None:
        for writer in tuple(self._writers):
            try:
                work(writer)
            except Exception as error:  # whatever a library of theirs may raise
                self._writers.remove(writer)
                _warn_left_out(writer.name, error)

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as lost:
            if error is None:
                raise
            _LOGGER.warning("%s", lost)  # what ended the run is to be its error


def _warn_left_out(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    _LOGGER.warning("%s failed and is left out from here on, training goes on: %s", name, reason)


def build_writers(
    run_dir: Path | str,
    *,
    rank: int,
    total_steps: int,
    log_every_steps: int,
    resumed_step: int = 0,
    eval_samples: int = 0,
) -> Writers:
    """Build the writers of a run: metrics.jsonl, TensorBoard and the console on rank 0, nothing on other ranks.

    Args:
        run_dir: The run's folder (train.output_dir).
        rank: This process's rank in the job.
        total_steps: The step the run ends at.
        log_every_steps: How often the console prints a line where there is no terminal.
        resumed_step: The step the run resumes from; later records of an earlier process are set aside.
        eval_samples: How many samples a validation shall read.
    """
    if rank != 0:
        return Writers()
    jsonl = JsonlWriter(Path(run_dir) / METRICS_FILE)
    if moved := jsonl.set_aside_after(resumed_step):
        _LOGGER.warning(
            "%d lines of %s that are of later steps than %d, or cannot be read, are in %s now",
            moved,
            jsonl.path,
            resumed_step,
            DROPPED_FILE,
        )
    writers: list[Writer] = [jsonl]
    try:
        writers.append(TensorBoardWriter(Path(run_dir) / TENSORBOARD_FOLDER, resumed_step=resumed_step))
    except Exception as error:  # a disk, or an installation of TensorBoard that cannot be imported
        _warn_left_out(TensorBoardWriter.name, error)
    writers.append(
        ConsoleWriter(
            total_steps=total_steps,
            log_every_steps=log_every_steps,
            resumed_step=resumed_step,
            eval_samples=eval_samples,
        )
    )
    return Writers(writers)

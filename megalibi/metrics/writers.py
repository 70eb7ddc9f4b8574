"""Where the records of a run go: metrics.jsonl, TensorBoard and the terminal, as one writer that outlives failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from megalibi.errors import UserError
from megalibi.log import get_logger
from megalibi.metrics.jsonl import DROPPED_FILE, JsonlWriter
from megalibi.metrics.progress import ConsoleWriter
from megalibi.metrics.records import METRICS_FILE, RollbackRecord, StepRecord, ValidationRecord
from megalibi.metrics.tensorboard import TENSORBOARD_FOLDER, TensorBoardWriter

_LOGGER = get_logger(__name__)


class Writer(Protocol):
    """A destination of records."""

    @property
    def name(self) -> str:
        """The name of the writer in a warning."""

    def step(self, record: StepRecord) -> None:
        """Take the record of one step."""

    def validation(self, record: ValidationRecord) -> None:
        """Take the record of one validation."""

    def go_back(self, record: RollbackRecord) -> None:
        """Take back the records of the steps that a loss spike took back."""

    def sync(self) -> None:
        """Put all records so far on the disk."""

    def close(self) -> None:
        """Finish. The writer is not used afterwards."""


class Writers:
    """Several writers as one, which are closed at the end of a ``with`` block.

    A failing writer does not end the run: one warning names it with the reason, and it is left out from then on.

    Args:
        writers: The writers that get every record; ranks other than rank 0 have none.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = list(writers)

    def step(self, record: StepRecord) -> None:
        """Hand the record of one step to every writer."""
        self._each(lambda writer: writer.step(record))

    def validation(self, record: ValidationRecord) -> None:
        """Hand the record of one validation to every writer."""
        self._each(lambda writer: writer.validation(record))

    def go_back(self, record: RollbackRecord) -> None:
        """Have every writer take back the records of the steps that a loss spike took back."""
        self._each(lambda writer: writer.go_back(record))

    def sync(self) -> None:
        """Have every writer put its records on the disk."""
        self._each(lambda writer: writer.sync())

    def close(self) -> None:
        """Close every writer.

        Raises:
            FileError: Lines of metrics.jsonl could not be written.
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
            except Exception as error:  # the libraries behind the writers may raise anything
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
            _LOGGER.warning("%s", lost)  # the error that ended the run is the one to report


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
        log_every_steps: Steps between two lines of progress where there is no terminal.
        resumed_step: The step the run resumes from; records of later steps are set aside.
        eval_samples: Number of samples that a validation is asked to read.
    """
    if rank != 0:
        return Writers()
    jsonl = JsonlWriter(Path(run_dir) / METRICS_FILE)
    if moved := jsonl.set_aside_after(resumed_step):
        _LOGGER.warning(
            "%d lines of %s that belong to steps after %d or cannot be read were moved to %s",
            moved,
            jsonl.path,
            resumed_step,
            DROPPED_FILE,
        )
    writers: list[Writer] = [jsonl]
    try:
        writers.append(TensorBoardWriter(Path(run_dir) / TENSORBOARD_FOLDER, resumed_step=resumed_step))
    except Exception as error:  # the disk fails, or TensorBoard cannot be imported
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

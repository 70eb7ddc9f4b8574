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
from megalibi.metrics.records import METRICS_FILE, StepRecord, ValidationRecord
from megalibi.metrics.tensorboard import TENSORBOARD_FOLDER, TensorBoardWriter

_LOGGER = get_logger(__name__)


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

"""metrics.jsonl as a run writes it: a line for every record, none lost by a crash, a full disk or going back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megalibi.errors import ConfigError
from megalibi.files import make_folder, open_aside, sync_file, sync_folder
from megalibi.log import get_logger
from megalibi.metrics.records import StepRecord, ValidationRecord, parse_line

_LOGGER = get_logger(__name__)

DROPPED_FILE = "metrics.dropped.jsonl"
"""Lines of metrics.jsonl that a run set aside when it went back to a checkpoint."""


class JsonlWriter:
    """Appends one line per record to metrics.jsonl.

    Each line is flushed, so a killed process loses none. They are not synced to the disk one by one, but before each
    checkpoint: after a power failure the run resumes from one, and `set_aside_after` moves away what lies beyond it.

    A disk that is full does not end the run, for that would cost the steps since the last checkpoint: lines that cannot
    be written are kept, and tried again with each record, before each checkpoint and at the end. If space is made in
    the meantime nothing is lost; if not, the next checkpoint, which is larger, says so on all ranks.

    Args:
        path: The file; it and its folder are made if they do not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._unwritten = bytearray()
        self._is_failing = False
        make_folder(self.path.parent)
        self._file = self.path.open("a", encoding="utf-8")

    def set_aside_after(self, step: int) -> int:
        """Move the lines of later steps, and those that cannot be read, to metrics.dropped.jsonl.

        So the file has each step once, and no line is lost. It is rewritten aside and renamed: a crash meanwhile leaves
        the old file or the new one, never a part. Its name is on the disk then: every run begins with this, a new one
        too, so that `sync` need not see to it.

        Args:
            step: The step the run resumes from; 0 empties the file.

        Returns:
            The number of lines that were moved.
        """
        self._file.close()
        dropped = []
        with open_aside(self.path) as kept:
            for line in _read_lines(self.path):
                if _is_until(line, step):
                    kept.write(line)
                else:
                    dropped.append(line if line.endswith(b"\n") else line + b"\n")
            if dropped:
                with self.path.with_name(DROPPED_FILE).open("ab") as file:
                    file.writelines(dropped)
                    sync_file(file)
                sync_folder(self.path.parent)
        self._file = self.path.open("a", encoding="utf-8")
        return len(dropped)

    def step(self, record: StepRecord) -> None:
        """Append the record of one step."""
        self._append(record.to_json())

    def validation(self, record: ValidationRecord) -> None:
        """Append the record of one validation."""
        self._append(record.to_json())

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        self._write(again=True)
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file.

        Raises:
            ConfigError: Lines could not be written.
        """
        self._write()
        self._file.close()
        if self._unwritten:
            num_lines = self._unwritten.count(b"\n")
            raise ConfigError(
                f"the last {num_lines} lines of {self.path} could not be written and are lost; "
                "checkpoints are not affected"
            )

    def _append(self, line: str) -> None:
        self._unwritten += f"{line}\n".encode()
        self._write()

    def _write(self, *, again: bool = False) -> None:
        """Write what is not written yet; a line that was written in part goes on where it broke off."""
        descriptor = self._file.fileno()
        try:
            while self._unwritten:
                del self._unwritten[: os.write(descriptor, self._unwritten)]
        except OSError as error:
            if again or not self._is_failing:
                self._warn(error)
            return
        if self._is_failing:
            self._is_failing = False
            _LOGGER.warning("%s can be written again, no line is missing", self.path)

    def _warn(self, error: OSError) -> None:
        self._is_failing = True
        _LOGGER.warning(
            "%s cannot be written: %s; %d lines are kept in memory and tried again with each step, training goes on: "
            "make room before the next checkpoint",
            self.path,
            error.strerror,
            self._unwritten.count(b"\n"),
        )


def _read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is whole and of a step that is not later."""
    try:
        # Without its newline a line is torn, even where what is left happens to be JSON.
        return line.endswith(b"\n") and parse_line(line.decode()).step <= step
    except ValueError:
        return False

"""The writer of metrics.jsonl: one line per record, and no line is lost by a crash, a full disk or a step back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megalibi.errors import FileError
from megalibi.files import make_folder, open_aside, sync_file, sync_folder
from megalibi.log import get_logger
from megalibi.metrics.records import RollbackRecord, StepRecord, ValidationRecord, parse_line

_LOGGER = get_logger(__name__)

DROPPED_FILE = "metrics.dropped.jsonl"
"""File with the lines that were moved out of metrics.jsonl when the run went back to an earlier checkpoint."""


class JsonlWriter:
    """Appends one line per record to metrics.jsonl.

    Each line is handed to the system at once, so that a killed process loses none. Lines are synced to the disk only
    before a checkpoint: after a power failure the run resumes from a checkpoint, and `set_aside_after` moves the lines
    of later steps away.

    A full disk does not end the run, because that would cost the steps since the last checkpoint. Lines that cannot be
    written are kept in memory and tried again with each record, before each checkpoint and at the end. If somebody
    makes room in time, nothing is lost. If not, the next checkpoint, which needs more room, fails on all ranks.

    Args:
        path: The file to append to; it and its folder are made if they do not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._unwritten = bytearray()
        self._is_failing = False
        make_folder(self.path.parent)
        self._file = self.path.open("a", encoding="utf-8")

    def set_aside_after(self, step: int) -> int:
        """Move the lines of later steps, and lines that cannot be read, to metrics.dropped.jsonl.

        Afterwards the file has each step once, and no line is lost. The file is written aside and renamed: a crash
        leaves the old file or the new one, never a part of one. Every run begins with this call, which also puts the
        name of the file on the disk; `sync` therefore syncs the lines alone.

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

    def go_back(self, record: RollbackRecord) -> None:
        """Move the lines of the steps that a loss spike took back away, and append the line that says so."""
        self._write()
        kept = [line for line in self._unwritten.splitlines(keepends=True) if _is_until(bytes(line), record.step)]
        self._unwritten = bytearray(b"".join(kept))
        self.set_aside_after(record.step)
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
            FileError: Lines could not be written.
        """
        self._write()
        self._file.close()
        if self._unwritten:
            num_lines = self._unwritten.count(b"\n")
            raise FileError(
                f"the last {num_lines} lines of {self.path} could not be written and are lost; "
                "checkpoints are not affected"
            )

    def _append(self, line: str) -> None:
        self._unwritten += f"{line}\n".encode()
        self._write()

    def _write(self, *, again: bool = False) -> None:
        """Write what is not written yet, from the byte on at which an earlier attempt stopped."""
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
            "%s cannot be written: %s; training goes on, %d lines are kept in memory and tried again with each step: "
            "make room before the next checkpoint",
            self.path,
            error.strerror,
            self._unwritten.count(b"\n"),
        )


def _read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is complete and belongs to this step or an earlier one."""
    try:
        # A line without its newline is torn, even if what is left of it happens to be valid JSON.
        return line.endswith(b"\n") and parse_line(line.decode()).step <= step
    except ValueError:
        return False

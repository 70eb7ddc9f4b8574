"""What must hold in the index of a token file, checked when it is opened: a flipped bit must not move documents.

The parts say the same thing twice: byte offsets are the running sum of the lengths, the lengths add up to the .bin, and
document indices rise from 0 to the number of sequences. The parts are read in blocks, not mapped: an index of any
size takes a few megabytes, and little time.

What no reader can find: which of its sequences begin documents is said only once. In a file whose documents have
several sequences each, a document index that is off but still between its neighbours makes another valid file. Where
documents have one sequence each (or none, if empty), as in every file that TokenFileWriter or Megatron-LM makes for a
GPT, it shows: a document of two sequences beside one of none, and no other like it. And the type code is said once:
no single bit makes another integer type of the same size of it, but several do (int16 is 3, uint16 is 8).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from megalibi.errors import DataError

_BLOCK_ENTRIES = 1 << 14  # few enough for a processor's cache: twice as fast as eight times as many
_MAX_BYTES = 2**62  # of a .bin; far below the end of int64, so that a block more does not pass it
# Of fewer documents, one of two sequences beside one of none is no sign of damage.
_MIN_DOCUMENTS = 16


class IndexReader:
    """Reads the three parts of an index.

    Args:
        path: The .idx file.
        descriptor: The descriptor of the same file, which is open.
        start: Bytes before the lengths.
        num_sequences: What the header says, as num_boundaries; the size of the file agrees with both.
        num_boundaries: Number of document indices.
    """

    def __init__(self, path: Path, descriptor: int, *, start: int, num_sequences: int, num_boundaries: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._num_sequences = num_sequences
        self._num_boundaries = num_boundaries
        self._lengths = start
        self._pointers = start + 4 * num_sequences
        self._boundaries = start + 12 * num_sequences

    def check_sequences(self, itemsize: int) -> int:
        """Check that no length is negative and that each offset is where the sequences before it end.

        Args:
            itemsize: Bytes of a token.

        Returns:
            The bytes of all sequences.

        Raises:
            DataError: At the first sequence for which that does not hold.
        """
        end = 0
        for first, lengths in self._blocks(self._lengths, "<i4", self._num_sequences):
            pointers = self._read(self._pointers + 8 * first, "<i8", len(lengths))
            num_bytes = lengths.astype(np.int64) * itemsize
            starts = np.cumsum(num_bytes) + end - num_bytes
            negative = np.flatnonzero(lengths < 0)
            wrong = np.flatnonzero(starts != pointers)
            if negative.size:
                self._refuse(f"sequence {first + negative[0]} has length {lengths[negative[0]]}")
            if wrong.size:
                self._refuse(
                    f"sequence {first + wrong[0]} begins at byte {pointers[wrong[0]]}, but those before it "
                    f"end at {starts[wrong[0]]}"
                )
            end = int(starts[-1] + num_bytes[-1])
            if end > _MAX_BYTES:
                self._refuse(f"its first {first + len(lengths)} sequences have {end} bytes")
        return end

    def check_documents(self) -> None:
        """Check that the document indices rise from 0 to the number of sequences; empty documents repeat one.

        Raises:
            DataError: They do not, or one of them is off (see the module).
        """
        last, num_long, long_document = 0, 0, 0
        for first, boundaries in self._blocks(self._boundaries, "<i8", self._num_boundaries):
            before = np.concatenate(([last], boundaries[:-1]))
            falling = np.flatnonzero(boundaries < before)
            if falling.size:
                at = falling[0]
                self._refuse(f"document index {first + at} is {boundaries[at]}, after {before[at]}: they must rise")
            if first == 0 and boundaries[0] != 0:
                self._refuse(f"the first document index is {boundaries[0]}, not 0")
            long = np.flatnonzero(boundaries - before > 1)
            num_long += long.size
            long_document = first + int(long[0]) - 1 if long.size else long_document
            last = int(boundaries[-1])
        if self._num_boundaries == 0 or last != self._num_sequences:
            self._refuse(f"the document indices do not span its {self._num_sequences} sequences")
        if num_long == 1 and self._num_boundaries > _MIN_DOCUMENTS:
            self._check_long_document(long_document)

    def _check_long_document(self, document: int) -> None:
        """Refuse the only document of more than one sequence if a boundary that is off by one explains it."""
        first = max(document - 1, 0)
        count = min(document + 3, self._num_boundaries) - first
        sequences = np.diff(self._read(self._boundaries + 8 * first, "<i8", count))
        if sequences[document - first] == 2 and (sequences == 0).any():
            self._refuse(
                f"document {document} alone has two sequences, beside one that has none: its document index is off"
            )

    def _blocks(self, offset: int, dtype: str, count: int) -> Iterator[tuple[int, npt.NDArray[np.signedinteger[Any]]]]:
        itemsize = np.dtype(dtype).itemsize
        for first in range(0, count, _BLOCK_ENTRIES):
            yield first, self._read(offset + itemsize * first, dtype, min(_BLOCK_ENTRIES, count - first))

    def _read(self, offset: int, dtype: str, count: int) -> npt.NDArray[np.signedinteger[Any]]:
        num_bytes = count * np.dtype(dtype).itemsize
        data = os.pread(self._descriptor, num_bytes, offset)
        if len(data) < num_bytes:
            self._refuse("it became shorter while it was read")
        return np.frombuffer(data, dtype)

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{self._path}: {reason}; the index is damaged: copy it or write it again")

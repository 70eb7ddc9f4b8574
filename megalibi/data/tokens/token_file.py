"""Token files: Megatron-LM's indexed format, version 1, read memory-mapped and written aside.

PREFIX.bin holds the tokens of all documents one after the other. PREFIX.idx holds, little-endian and without padding:
magic, version (uint64), type code (uint8), number of sequences (uint64), number of document indices (uint64), then
int32 sequence lengths in tokens, int64 byte offsets of the sequences, and int64 document indices (the sequence with
which each document begins, and a last one past the end). A document has one sequence or several.

Source: megatron/core/datasets/indexed_dataset.py in NVIDIA/Megatron-LM at 00caa53af30912914981c86f39db123961678bbd.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalibi.data.tokens.identity import Identity, sampled_sha256
from megalibi.data.tokens.token_index import IndexReader
from megalibi.data.tokens.unchanged import UnchangedFiles
from megalibi.errors import DataError
from megalibi.files import AsideFile, sync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_MAX_SEQUENCE_TOKENS = 2**31 - 1
_UINT16_VOCAB_SIZE = 65_500  # Megatron-LM's own bound (DType.optimal_dtype), so that its files and ours are the same

IntegerArray = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron-LM stores tokens of a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB_SIZE else "<i4")


class TokenFile:
    """A memory-mapped token file, seen as one stream of tokens with documents in it.

    Opening reads the index once, in blocks, to check it: about a second for 10^8 sequences. The tokens stay unread.

    Args:
        prefix: Path without ``.bin`` and ``.idx``.

    Raises:
        DataError: If a file is missing, truncated, damaged, or not in this format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.bin_path = Path(f"{self.prefix}.bin")
        self.idx_path = Path(f"{self.prefix}.idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path}: no such token file; write it with megalibi preprocess")
        self._unchanged = UnchangedFiles((self.idx_path, self.bin_path))
        with self.idx_path.open("rb") as file:
            index = _map(file)
            num_sequences, num_boundaries = self._read_header(index)
            pointers_start = _HEADER.size + 4 * num_sequences
            pointers_end = pointers_start + 8 * num_sequences
            self._check_size(self.idx_path, len(index), pointers_end + 8 * num_boundaries)
            num_bytes = self._check_index(file, num_sequences, num_boundaries)
        # Not aligned in the file, so numpy's own binary search would copy them whole; memoryviews need no alignment.
        self._pointers = memoryview(index)[pointers_start:pointers_end].cast("q")
        self._boundaries = memoryview(index)[pointers_end:].cast("q")
        self.num_documents = num_boundaries - 1
        self.num_tokens = num_bytes // self.dtype.itemsize
        with self.bin_path.open("rb") as file:
            self._tokens: IntegerArray = np.frombuffer(_map(file), self.dtype, self.num_tokens)

    @cached_property
    def identity(self) -> Identity:
        """What tells this file from others; reads 128 MiB at most."""
        return self._identify()

    def check_unchanged(self) -> None:
        """Check that the files are what they were when they were opened.

        Raises:
            DataError: The content of one is another one now.
        """
        self._unchanged.check(self.__dict__.get("identity"), self._identify)

    def _identify(self) -> Identity:
        return Identity(
            tokens=self.num_tokens,
            documents=self.num_documents,
            idx_sha256=sampled_sha256(self.idx_path),
            bin_sha256=sampled_sha256(self.bin_path),
        )

    def read(self, start_token: int, count: int) -> IntegerArray:
        """Return ``count`` tokens from ``start_token`` on, as a read-only view of the file in its own type."""
        return self._tokens[start_token : start_token + count]

    def document_starts_between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the stream positions in [start, stop) at which documents begin, in order.

        Takes two binary searches on the mapped index. Empty documents repeat a position.
        """
        itemsize = self.dtype.itemsize
        first_sequence = bisect_left(self._pointers, start * itemsize)
        last_sequence = bisect_left(self._pointers, stop * itemsize, lo=first_sequence)
        # The last boundary is the end of the stream and begins no document.
        first = bisect_left(self._boundaries, first_sequence, hi=self.num_documents)
        last = bisect_left(self._boundaries, last_sequence, lo=first, hi=self.num_documents)
        sequences = np.frombuffer(self._boundaries[first:last], "<i8")
        return np.frombuffer(self._pointers, "<i8")[sequences] // itemsize

    def _read_header(self, index: mmap.mmap | bytes) -> tuple[int, int]:
        if len(index) < _HEADER.size:
            raise DataError(f"{self.idx_path}: truncated, {len(index)} bytes; write it again or copy it again")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(index[: _HEADER.size])
        if magic != _MAGIC:
            raise DataError(f"{self.idx_path}: not a Megatron-LM index; write one with megalibi preprocess")
        if version != _VERSION:
            raise DataError(f"{self.idx_path}: index version {version}; only version {_VERSION} can be read")
        name = _DTYPES.get(code, f"unknown code {code}")
        if "int" not in name:
            raise DataError(f"{self.idx_path}: token type is {name}; tokens must be integers")
        self.dtype = np.dtype(name).newbyteorder("<")
        return num_sequences, num_boundaries

    def _check_index(self, file: BinaryIO, num_sequences: int, num_boundaries: int) -> int:
        """Check the index and the size of the .bin, and return the latter."""
        reader = IndexReader(
            self.idx_path,
            file.fileno(),
            start=_HEADER.size,
            num_sequences=num_sequences,
            num_boundaries=num_boundaries,
        )
        reader.check_documents()
        num_bytes = reader.check_sequences(self.dtype.itemsize)
        self._check_size(self.bin_path, self.bin_path.stat().st_size, num_bytes)
        return num_bytes

    def _check_size(self, path: Path, actual: int, expected: int) -> None:
        if actual < expected:
            raise DataError(
                f"{path}: truncated, {actual} bytes of the {expected} that {self.idx_path} promises; copy or write "
                "both again"
            )
        if actual > expected:
            raise DataError(
                f"{path}: {actual} bytes, but {self.idx_path} promises {expected}; .bin and .idx must come from one "
                "run, and multimodal files are not supported"
            )


def _map(file: BinaryIO) -> mmap.mmap | bytes:
    if os.fstat(file.fileno()).st_size == 0:
        return b""  # an empty file cannot be mapped
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_token_ids(token_file: TokenFile, vocab_size: int, *, num_probes: int = 64, probe_tokens: int = 1024) -> None:
    """Look for ids past the vocabulary in a bounded number of places spread evenly over a file.

    The format does not record the vocabulary, and reading all of a large file takes long; what this misses is found
    when a batch holds it.

    Raises:
        DataError: If an id is not in [0, vocab_size).
    """
    last_start = max(token_file.num_tokens - probe_tokens, 0)
    for start in sorted({last_start * probe // max(num_probes - 1, 1) for probe in range(num_probes)}):
        check_ids(token_file.read(start, probe_tokens), vocab_size, token_file, start)


def check_ids(tokens: IntegerArray, vocab_size: int, token_file: TokenFile, start: int) -> None:
    """Check tokens that were read from ``start`` on.

    Raises:
        DataError: If an id is not in [0, vocab_size); names the file, the position and the id.
    """
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if bad.size:
        raise DataError(
            f"{token_file.bin_path}: token {start + int(bad[0])} is id {int(tokens[bad[0]])}, past "
            f"vocab_size={vocab_size}; the file was made with another tokenizer, or model.vocab_size is too small"
        )


class TokenFileWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear only when they are complete.

    Use it as a context manager: leaving it normally finishes the files, leaving it by an exception removes them.
    Memory grows by 16 bytes a document.

    Args:
        prefix: Path without ``.bin`` and ``.idx``.
        vocab_size: Number of token ids; decides the type of the tokens.

    Raises:
        FileInUseError: Another process is writing these files.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._sequence_tokens = 0
        self._bin = AsideFile(f"{os.fspath(prefix)}.bin")
        try:
            self._idx = AsideFile(f"{os.fspath(prefix)}.idx")
        except BaseException:
            self._bin.discard()
            raise

    @property
    def num_documents(self) -> int:
        """Number of documents that have been ended."""
        return len(self._boundaries) - 1

    def add_document(self, tokens: Sequence[int] | IntegerArray) -> None:
        """Write one whole document."""
        self.add_tokens(tokens)
        self.end_document()

    def add_tokens(self, tokens: Sequence[int] | IntegerArray) -> None:
        """Write tokens of a document that ``end_document`` will end."""
        array_ = np.asarray(tokens, self.dtype)
        self._bin.file.write(array_.tobytes())
        self.num_tokens += array_.size
        self._sequence_tokens += array_.size
        while self._sequence_tokens > _MAX_SEQUENCE_TOKENS:  # lengths are int32: go on in another sequence
            self._lengths.append(_MAX_SEQUENCE_TOKENS)
            self._sequence_tokens -= _MAX_SEQUENCE_TOKENS

    def end_document(self) -> None:
        """End the document to which tokens were added last."""
        self._lengths.append(self._sequence_tokens)
        self._boundaries.append(len(self._lengths))
        self._sequence_tokens = 0

    def finish(self) -> None:
        """Write the index, flush both files to the disk, and put them in place, the index last."""
        self._write_index(self._idx.file)
        self._bin.sync()
        self._idx.sync()
        if self._idx.path.exists():  # an old index must never describe a new .bin, not even after a power failure
            self._idx.path.unlink()
            sync_folder(self._idx.path.parent)
        self._bin.commit()
        self._idx.commit()

    def discard(self) -> None:
        """Remove what was written and is not in place."""
        self._bin.discard()
        self._idx.discard()

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, name in _DTYPES.items() if name == self.dtype.name)
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(self._lengths), len(self._boundaries)))
        lengths = np.frombuffer(self._lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
        file.write(np.frombuffer(self._boundaries, np.int64).astype("<i8").tobytes())

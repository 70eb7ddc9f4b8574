"""One file of a checkpoint: what a rank's optimizer holds, in the format of safetensors.

The file begins with the length of its header, which is JSON, and goes on with the bytes of the tensors. Nothing in it
could make a reader run anything (https://github.com/huggingface/safetensors#format). It is written and read here and
not by the library, because it is hashed on its way to the disk without a second copy of the tensors, and because a rank
of another topology reads stretches from many files: a mapped file would count as memory of the process. While a block
is written, another thread hashes it: one after the other would take the time of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megalibi.checkpoint.manifest import FileEntry
from megalibi.checkpoint.tensors.safetensors_header import (
    METADATA,
    HeaderEntry,
    encode_safetensors_header,
    read_safetensors_header,
)
from megalibi.errors import CheckpointError, FileError, describe_os_error
from megalibi.files import sync_file

WEIGHT = "weight"
"""The kind of the weights themselves, beside the states that the optimizer keeps."""
CONTENTS = ("weights", "optimizer")
"""What the two files of a rank hold."""
_CHUNK_ELEMENTS = 1 << 22
_HASHED_BESIDE_BYTES = 1 << 20
"""From this size on a block is worth another thread."""
_ELEMENT = np.dtype("<f4")
_STARTS = "starts"
_TENSOR_RANK = "tensor_rank"


class StoredPiece(Protocol):
    """Elements of a flattened slice that lie in a file."""

    @property
    def start(self) -> int:
        """The first element."""

    @property
    def length(self) -> int:
        """The number of elements."""

    def read(self, first: int, last: int) -> Tensor:
        """Return the elements from ``first`` up to ``last`` of the slice, [last - first]."""


StoredPieces = dict[tuple[str, str, int], list[StoredPiece]]
"""By kind, parameter and tensor rank, in the order of their elements."""


class Stretch(NamedTuple):
    """Which elements of a parameter's weight, or of a state that the optimizer keeps for it, a file holds."""

    kind: str
    """``weight``, or the state's name."""
    name: str
    """The parameter's name in the model."""
    start: int
    """The first element in the tensor rank's slice of the parameter, flattened."""
    length: int
    """How many elements they are."""

    @property
    def key(self) -> str:
        """The name of its tensor in the file."""
        return f"{self.kind}/{self.name}"


class StretchInFile(NamedTuple):
    """Elements that lie in a file, and are read when they are asked for."""

    path: Path
    """The file that holds them."""
    offset: int
    """The place of the first one in the file, in bytes."""
    start: int
    """The first element in the tensor rank's slice of the parameter, flattened."""
    length: int
    """How many elements they are."""

    def read(self, first: int, last: int) -> Tensor:
        """Return the elements from ``first`` up to ``last`` of the slice, [last - first].

        Raises:
            CheckpointError: The file has become shorter.
            FileError: It may not be read.
        """
        values = np.empty(last - first, _ELEMENT)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + (first - self.start) * _ELEMENT.itemsize)
                rest = values.view(np.uint8).data
                while rest.nbytes and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise FileError(describe_os_error(error, self.path)) from error
        if rest.nbytes:
            raise CheckpointError(f"{self.path} ends too early")
        return torch.from_numpy(values.astype(np.float32, copy=False))


def name_state_file(content: str, tensor_rank: int, data_rank: int) -> str:
    """Return the name of a rank's file; its content is ``weights`` or ``optimizer``."""
    return f"{content}_tensor_{tensor_rank:02d}_data_{data_rank:04d}.safetensors"


def find_content(kind: str) -> str:
    """Return in which of a rank's files the values of a kind are: ``weights`` or ``optimizer``."""
    return CONTENTS[kind != WEIGHT]


def cut_evenly(length: int, parts: int) -> list[range]:
    """Return as many stretches of about equal length, one after the other."""
    return [range(length * part // parts, length * (part + 1) // parts) for part in range(parts)]


class StateFileWriter:
    """Writes a file, one stretch after the other.

    Args:
        path: The file.
        tensor_rank: The tensor rank of whose slices the stretches are.
        stretches: What the file shall hold, in the order in which it is written.

    Raises:
        OSError: The disk is full or fails, now or later.
    """

    def __init__(self, path: Path, tensor_rank: int, stretches: Sequence[Stretch]) -> None:
        header = _encode_header(tensor_rank, stretches)
        self._expected = len(header) + _ELEMENT.itemsize * sum(stretch.length for stretch in stretches)
        self._digest, self._size = hashlib.sha256(), 0
        self._hashing = ThreadPoolExecutor(1)  # which makes its thread when it is first needed
        self._file = path.open("wb")
        self._write(header)

    def __enter__(self) -> StateFileWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file after an error; what could not be written is lost."""
        self._hashing.shutdown()
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()

    def write(self, values: Tensor) -> None:
        """Write the elements of the next stretch, [n], from any device and in any floating type."""
        for chunk in values.detach().split(_CHUNK_ELEMENTS):
            self._write(np.ascontiguousarray(chunk.float().cpu().numpy(), dtype=_ELEMENT).data.cast("B"))

    def close(self) -> FileEntry:
        """Wait for the disk; return the file's size and checksum."""
        assert self._size == self._expected, (self._file.name, self._size, self._expected)
        sync_file(self._file)
        self._file.close()
        self._hashing.shutdown()
        return FileEntry(size_bytes=self._size, sha256=self._digest.hexdigest())

    def _write(self, block: bytes | memoryview) -> None:
        if len(block) < _HASHED_BESIDE_BYTES:
            self._file.write(block)
            self._digest.update(block)
        else:
            hashed = self._hashing.submit(self._digest.update, block)
            self._file.write(block)
            hashed.result()
        self._size += len(block)


def _encode_header(tensor_rank: int, stretches: Sequence[Stretch]) -> bytes:
    starts = json.dumps({stretch.key: stretch.start for stretch in stretches})
    entries = [HeaderEntry(stretch.key, "F32", (stretch.length,)) for stretch in stretches]
    return encode_safetensors_header(entries, {_TENSOR_RANK: str(tensor_rank), _STARTS: starts})


def list_stretches(path: Path) -> tuple[int, dict[tuple[str, str], StretchInFile]]:
    """Return the tensor rank of a file, and what the file holds by kind and parameter.

    Raises:
        CheckpointError: It is no such file.
        FileError: It may not be read.
    """
    header, begin, file_bytes = read_safetensors_header(path)
    try:
        return _read_header(path, header, begin, file_bytes)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be loaded: its header is not that of megalibi: {error!r}") from error


def _read_header(
    path: Path, header: dict[str, Any], begin: int, file_bytes: int
) -> tuple[int, dict[tuple[str, str], StretchInFile]]:
    metadata = header.pop(METADATA)
    starts = json.loads(metadata[_STARTS])
    found, reached = {}, begin
    for key, entry in header.items():
        (length,) = entry["shape"]
        numbers = (length, starts[key], *entry["data_offsets"])
        if entry["dtype"] != "F32" or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{key} must be of F32 and have whole numbers")
        if begin + entry["data_offsets"][0] != reached:
            raise ValueError(f"{key} does not begin where the tensor before it ends")
        reached += length * _ELEMENT.itemsize
        if begin + entry["data_offsets"][1] != reached:
            raise ValueError(f"{key} has another number of bytes than its shape says")
        kind, _, name = key.partition("/")
        found[kind, name] = StretchInFile(path, reached - length * _ELEMENT.itemsize, starts[key], length)
    if reached != file_bytes:
        raise ValueError(f"{file_bytes - reached} bytes belong to no tensor")
    return int(metadata[_TENSOR_RANK]), found

"""One file of a checkpoint: what a rank's optimizer holds, in the format of safetensors.

The file begins with the length of its header, which is JSON, and goes on with the bytes of the tensors. Nothing in it
could make a reader run anything (https://github.com/huggingface/safetensors). It is written here and not by the library
because it is hashed on its way to the disk, and no second copy of the tensors is made; the library reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import safetensors
from torch import Tensor

from megalibi.checkpoint.manifest import FileEntry
from megalibi.errors import CheckpointError, FileError, describe_os_error
from megalibi.files import sync_file

WEIGHT = "weight"
"""The kind of the weights themselves, beside the states that the optimizer keeps."""
_CHUNK_ELEMENTS = 1 << 22
_ALIGNMENT_BYTES = 8
_ELEMENT_BYTES = 4
_STARTS = "starts"
_TENSOR_RANK = "tensor_rank"


class StoredPiece(Protocol):
    """Elements of a flattened slice that lie in a file."""

    @property
    def start(self) -> int:
        """The first element."""

    @property
    def length(self) -> int:
        """How many elements they are."""

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
    key: str
    """The name of their tensor there."""
    start: int
    """The first element in the tensor rank's slice of the parameter, flattened."""
    length: int
    """How many elements they are."""

    def read(self, first: int, last: int) -> Tensor:
        """Return the elements from ``first`` up to ``last`` of the slice, [last - first].

        Raises:
            CheckpointError: The file is no safetensors file any more.
            FileError: It may not be read.
        """
        with _open(self.path) as file:
            values: Tensor = file.get_slice(self.key)[first - self.start : last - self.start]
        return values


def name_state_file(content: str, tensor_rank: int, data_rank: int) -> str:
    """Return the name of a rank's file; its content is ``weights`` or ``optimizer``."""
    return f"{content}_tensor_{tensor_rank:02d}_data_{data_rank:04d}.safetensors"


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
        self._digest, self._size = hashlib.sha256(), 0
        self._file = path.open("wb")
        self._write(_encode_header(tensor_rank, stretches))

    def write(self, values: Tensor) -> None:
        """Write the elements of the next stretch, [n], from any device and in any floating type."""
        for chunk in values.detach().split(_CHUNK_ELEMENTS):
            self._write(np.ascontiguousarray(chunk.float().cpu().numpy(), dtype="<f4").data.cast("B"))

    def close(self) -> FileEntry:
        """Wait for the disk; return the file's size and checksum."""
        sync_file(self._file)
        self._file.close()
        return FileEntry(size_bytes=self._size, sha256=self._digest.hexdigest())

    def _write(self, block: bytes | memoryview) -> None:
        self._file.write(block)
        self._digest.update(block)
        self._size += len(block)


def _encode_header(tensor_rank: int, stretches: Sequence[Stretch]) -> bytes:
    header: dict[str, object] = {}
    offset = 0
    for stretch in stretches:
        end = offset + stretch.length * _ELEMENT_BYTES
        header[stretch.key] = {"dtype": "F32", "shape": [stretch.length], "data_offsets": [offset, end]}
        offset = end
    starts = json.dumps({stretch.key: stretch.start for stretch in stretches})
    header["__metadata__"] = {_TENSOR_RANK: str(tensor_rank), _STARTS: starts}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def list_stretches(path: Path) -> tuple[int, dict[tuple[str, str], StretchInFile]]:
    """Return the tensor rank of a file, and what the file holds by kind and parameter.

    Raises:
        CheckpointError: It is no such file.
        FileError: It may not be read.
    """
    with _open(path) as file:
        try:
            metadata = file.metadata()
            starts = json.loads(metadata[_STARTS])
            found = {}
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                kind, _, name = key.partition("/")
                (length,) = file.get_slice(key).get_shape()
                found[kind, name] = StretchInFile(path, key, int(starts[key]), length)
            return int(metadata[_TENSOR_RANK]), found
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no state file of megalibi: {error!r}") from error


def _open(path: Path):  # type: ignore[no-untyped-def]  # the library names no type for it
    try:
        return safetensors.safe_open(path, framework="pt")
    except OSError as error:
        raise FileError(describe_os_error(error, path)) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error

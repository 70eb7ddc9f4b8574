"""The header of a file in the format of safetensors: its length in 8 bytes, then JSON that says where each tensor lies.

https://github.com/huggingface/safetensors#format has the format. Nothing in it could make a reader run anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalibi.errors import CheckpointError, FileError, describe_os_error

METADATA = "__metadata__"
"""The key under which a header has texts that are no tensors."""
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""The size of a number of each type that is written here, in bytes."""
_ALIGNMENT_BYTES = 8
_LARGEST_HEADER_BYTES = 100_000_000
"""As the library has it."""


class HeaderEntry(NamedTuple):
    """A tensor of a file."""

    name: str
    """The tensor's name, unique in its file."""
    dtype: str
    """The type of its numbers, as the format names it: F32, BF16 or F16."""
    shape: tuple[int, ...]
    """The shape of the tensor, row-major."""

    @property
    def size_bytes(self) -> int:
        """The number of bytes that its numbers take."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def encode_safetensors_header(entries: Sequence[HeaderEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a file, after which the tensors' bytes come in the same order without gaps.

    Args:
        entries: The tensors.
        metadata: Texts by name.
    """
    header: dict[str, object] = {}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    header[METADATA] = dict(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return what the header of a file says, the place of the first tensor and the size of the file, in bytes.

    Raises:
        CheckpointError: It is no such file.
        FileError: It may not be read.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < header_bytes <= min(file_bytes - 8, _LARGEST_HEADER_BYTES):
                raise CheckpointError(f"{path} cannot be loaded: it is no safetensors file")
            text = file.read(header_bytes)
    except OSError as error:
        raise FileError(describe_os_error(error, path)) from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be loaded: its header is no JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} cannot be loaded: its header is no JSON object")
    return header, 8 + header_bytes, file_bytes

"""Safetensors written into a folder, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megalibi.checkpoint.tensors.safetensors_header import HeaderEntry, encode_safetensors_header
from megalibi.errors import CheckpointError
from megalibi.export.certificate import as_bytes
from megalibi.files import sync_file, write_synced

MAX_SHARD_BYTES = 5_000_000_000
"""The most bytes of tensors in a file, above which there are several and an index: 5 GB, as at Hugging Face."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The name that safetensors has for each type that can be written."""


def plan_shards(entries: Sequence[HeaderEntry], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[HeaderEntry]]:
    """Return which tensors each file holds, in their order; a tensor that is larger has a file of its own."""
    shards: list[list[HeaderEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size_bytes
    return shards


def name_shard(number: int, count: int) -> str:
    """Return the name of a file of tensors: ``model.safetensors``, or ``model-00001-of-00002.safetensors``."""
    return WEIGHTS_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class TensorFolder:
    """Writes tensors into a folder, one after the other: one file, or several and their index.

    Args:
        folder: An existing folder.
        entries: What is written, in this order.
        max_shard_bytes: The most bytes of tensors in a file.
        metadata: Texts by name that each file has in its header, and the index in its metadata.
    """

    def __init__(
        self, folder: Path, entries: Sequence[HeaderEntry], *, max_shard_bytes: int, metadata: dict[str, str]
    ) -> None:
        shards = plan_shards(entries, max_shard_bytes)
        self.files = {
            entry.name: name_shard(number, len(shards)) for number, shard in enumerate(shards) for entry in shard
        }
        """The name of the file that holds each tensor."""
        self._folder, self._entries, self._metadata = folder, list(entries), metadata
        self._headers = {
            name_shard(number, len(shards)): encode_safetensors_header(shard, metadata)
            for number, shard in enumerate(shards)
        }
        self._file: BinaryIO | None = None
        self._next = 0

    def write(self, values: Tensor) -> None:
        """Write the next tensor, of its shape and type."""
        entry = self._entries[self._next]
        assert (tuple(values.shape), DTYPE_NAMES[values.dtype]) == (entry.shape, entry.dtype), entry
        name = self.files[entry.name]
        if self._next == 0 or self.files[self._entries[self._next - 1].name] != name:
            self._close_file()
            self._file = (self._folder / name).open("wb")
            self._file.write(self._headers[name])
        assert self._file is not None
        self._file.write(as_bytes(values))
        self._next += 1

    def close(self) -> None:
        """Wait for the disk, and write the index if there are several files."""
        assert self._next == len(self._entries)
        self._close_file()
        if len(self._headers) > 1:
            total = sum(entry.size_bytes for entry in self._entries)
            index = {"metadata": {**self._metadata, "total_size": total}, "weight_map": self.files}
            write_synced(self._folder / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())

    def _close_file(self) -> None:
        if self._file is not None:
            sync_file(self._file)
            self._file.close()
            self._file = None


def read_back(folder: Path, files: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder with its name, read by the library of safetensors, one after the other.

    Args:
        folder: The folder.
        files: The name of the file that holds each tensor.

    Raises:
        CheckpointError: A file is not what it should be.
    """
    from safetensors import SafetensorError, safe_open

    for name, file in files.items():
        try:
            with safe_open(folder / file, framework="pt") as opened:
                values = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / file} does not hold {name} after it was written: {error}") from error
        yield name, values

"""What a checkpoint holds of each parameter, whole or as any rank of any topology needs it.

However a checkpoint was cut, its files hold stretches of each tensor rank's slices, flattened. A tensor is put together
from them when it is asked for: a process that loads holds one whole tensor beside what it fills.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import MANIFEST, Manifest
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.checkpoint.tensors.deepspeed_files import index_deepspeed_files, read_deepspeed_progress
from megalibi.checkpoint.tensors.state_file import WEIGHT, StoredPieces, list_stretches
from megalibi.engine.masters import OptimizerProgress
from megalibi.errors import CheckpointError
from megalibi.parallel import ShardSpec, shard, unshard


class RankSlice(NamedTuple):
    """Which slice of a parameter a tensor rank holds."""

    spec: ShardSpec | None
    """How the parameter is cut; None: every tensor rank holds all of it."""
    rank: int
    """The tensor rank that holds it."""
    size: int
    """The number of tensor ranks."""


class SavedState:
    """The tensors of a checkpoint; nothing is verified here.

    Args:
        folder: The checkpoint's folder.
        manifest: Its manifest.
        parameters: What is said of each of its parameters, by name.

    Raises:
        CheckpointError: A file cannot be loaded, or would run code.
        FileError: A file may not be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, parameters: Mapping[str, ParameterEntry]) -> None:
        self._folder = folder
        self._manifest = manifest
        self._parameters = parameters
        self._size = manifest.topology["tensor_parallel_size"]
        if manifest.format_version > 2:
            self._pieces: StoredPieces = _index_state_files(folder / name for name in manifest.files)
        else:
            self._pieces = index_deepspeed_files(folder, manifest, parameters)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)
        self._last: tuple[tuple[str, str], Tensor] | None = None

    @property
    def kinds(self) -> set[str]:
        """``weight``, and the names of the states that the optimizer keeps."""
        return {kind for kind, _, _ in self._pieces}

    def read_progress(self) -> OptimizerProgress:
        """Return what the optimizer had done.

        Raises:
            CheckpointError: The checkpoint does not say it.
            FileError: A file may not be read.
        """
        if self._manifest.format_version < 3:
            return read_deepspeed_progress(self._folder, self._manifest)
        try:
            done = {name: value for name, value in self._manifest.optimizer.items() if name != "kind"}
            return OptimizerProgress(**done)
        except TypeError as error:
            raise CheckpointError(f"{self._folder / MANIFEST} does not say what the optimizer has done") from error

    def read_whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a tensor of its full shape, without padding, in fp32 on the CPU.

        Args:
            name: The parameter's name.
            kind: ``weight``, or a state of the optimizer.

        Raises:
            CheckpointError: The files do not hold what the manifest says.
            FileError: A file may not be read.
        """
        if self._last is None or self._last[0] != (name, kind):
            spec = self._parameters[name].shard
            slices = [self._read_slice(name, kind, rank) for rank in range(1 if spec is None else self._size)]
            self._last = (name, kind), slices[0] if spec is None else unshard(slices, spec)
        return self._last[1]

    def read_stretch(self, name: str, kind: str, first: int, last: int, cut: RankSlice) -> Tensor:
        """Return elements of a tensor rank's slice, flattened: [last - first], in fp32 on the CPU.

        Args:
            name: The parameter's name.
            kind: ``weight``, or a state of the optimizer.
            first: The first element.
            last: The one after the last.
            cut: Of which slice, where it is loaded.

        Raises:
            CheckpointError: The files do not hold what the manifest says.
            FileError: A file may not be read.
        """
        if cut.spec is None or (cut.size == self._size and cut.spec == self._parameters[name].shard):
            return self._read_elements(name, kind, 0 if cut.spec is None else cut.rank, first, last)
        return shard(self.read_whole(name, kind), cut.spec, cut.rank, cut.size).flatten()[first:last]

    def _read_slice(self, name: str, kind: str, rank: int) -> Tensor:
        shape = self._local_shape(name)
        return self._read_elements(name, kind, rank, 0, math.prod(shape)).view(shape)

    def _local_shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._parameters[name].local_shape(self._size)
        except ValueError as error:
            raise self._refusal(name, str(error)) from error

    def _read_elements(self, name: str, kind: str, rank: int, first: int, last: int) -> Tensor:
        pieces, shape = self._pieces.get((kind, name, rank), []), self._local_shape(name)
        stored = max((piece.start + piece.length for piece in pieces), default=0)
        if stored != math.prod(shape):
            raise self._refusal(name, f"its {kind} has {stored} elements on tensor rank {rank}, not {list(shape)}")
        parts, reached = [], first
        for piece in pieces:
            end = min(last, piece.start + piece.length)
            if piece.start <= reached < end:
                parts.append(piece.read(reached, end))
                reached = end
        if reached != last:
            raise self._refusal(name, f"no file has element {reached} of its {kind} on tensor rank {rank}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _refusal(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._folder} does not hold {name} as {MANIFEST} describes it: {why}")


def _index_state_files(paths: Iterable[Path]) -> StoredPieces:
    pieces: StoredPieces = {}
    for path in paths:
        rank, stretches = list_stretches(path)
        for (kind, name), stretch in stretches.items():
            pieces.setdefault((kind, name, rank), []).append(stretch)
    return pieces

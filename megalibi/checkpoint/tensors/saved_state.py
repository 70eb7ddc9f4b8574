"""What a checkpoint holds of each parameter, whole or as any rank of any topology needs it.

However a checkpoint was cut, its files hold stretches of each tensor rank's slices, flattened. A tensor is put together
from them when it is asked for, and a rank reads the slices alone that it shares elements with. A process that loads
holds one tensor and the slice that it is made of beside what it fills.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import MANIFEST, Manifest
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.checkpoint.tensors.deepspeed_files import DeepSpeedFiles
from megalibi.checkpoint.tensors.state_file import WEIGHT, StoredPieces, list_stretches
from megalibi.engine.masters import OptimizerProgress
from megalibi.errors import CheckpointError
from megalibi.parallel import ShardSpec


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
        self._deepspeed = DeepSpeedFiles(folder, manifest) if manifest.format_version < 3 else None
        self._pieces: StoredPieces = (
            _index_state_files(folder / name for name in manifest.files)
            if self._deepspeed is None
            else self._deepspeed.index(parameters)
        )
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: (piece.start, piece.length))

    @cached_property
    def kinds(self) -> set[str]:
        """``weight``, and the names of the states that the optimizer keeps."""
        return {kind for kind, _, _ in self._pieces}

    def read_progress(self) -> OptimizerProgress:
        """Return what the optimizer had done.

        Raises:
            CheckpointError: The checkpoint does not say it.
            FileError: A file may not be read.
        """
        if self._deepspeed is not None:
            return self._deepspeed.read_progress()
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
        spec = self._parameters[name].shard
        if spec is None:
            return self._read_slice(name, kind, 0)
        return self._cut_anew(name, kind, RankSlice(dataclasses.replace(spec, padding=0), 0, 1))

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
        return self._cut_anew(name, kind, cut).flatten()[first:last]

    def find_wrong_values(self, name: str) -> Iterator[str]:
        """Yield a line for each thing that is wrong with a parameter's numbers, those of the optimizer included.

        They must be finite, and what every tensor rank holds must be the same on all of them.

        Args:
            name: The parameter's name.

        Raises:
            CheckpointError: The files do not hold what the manifest says.
            FileError: A file may not be read.
        """
        for kind in sorted(self.kinds):
            whole = self.read_whole(name, kind)
            if wrong := int((~whole.isfinite()).sum()):
                yield f"{name} has {wrong:,} numbers that are not finite in its {kind}"
            if self._parameters[name].shard is None:
                for rank in range(1, self._size):
                    if not torch.equal(self._read_slice(name, kind, rank).view(torch.int32), whole.view(torch.int32)):
                        yield f"{name} has another {kind} on tensor rank {rank} than on tensor rank 0"

    def _cut_anew(self, name: str, kind: str, cut: RankSlice) -> Tensor:
        """Return a slice that is cut otherwise than in the files, from those there that it shares elements with."""
        spec, old = cut.spec, self._parameters[name].shard
        assert spec is not None
        try:
            shape = list(self._parameters[name].shape)
            shape[spec.dim] = spec.local_size(cut.size)
            wanted = spec.local_ranges(cut.rank, cut.size)
            stored = [old.local_ranges(rank, self._size) for rank in range(self._size)] if old is not None else []
        except ValueError as error:
            raise self._refusal(name, str(error)) from error
        if old is None or (old.dim, old.full_size) != (spec.dim, spec.full_size):
            raise self._refusal(name, f"it is cut as {old}, and needed as {spec}")
        local = torch.zeros(shape)
        for rank, ranges in enumerate(stored):
            moves = list(_find_moves(ranges, wanted, spec.full_size))
            if moves:
                source = self._read_slice(name, kind, rank)
                for begin, end, length in moves:
                    local.narrow(spec.dim, end, length).copy_(source.narrow(spec.dim, begin, length))
        return local

    def _read_slice(self, name: str, kind: str, rank: int) -> Tensor:
        shape = self._local_shape(name)
        return self._read_elements(name, kind, rank, 0, math.prod(shape)).view(shape)

    def _local_shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._parameters[name].local_shape(self._size)
        except ValueError as error:
            raise self._refusal(name, str(error)) from error

    def _read_elements(self, name: str, kind: str, rank: int, first: int, last: int) -> Tensor:
        shape = self._local_shape(name)
        if self._deepspeed is not None and kind not in self.kinds:
            return torch.zeros(last - first)  # DeepSpeed made the states in the first step that did not overflow
        parts, stored = [], 0
        for piece in self._pieces.get((kind, name, rank), []):
            if piece.start != stored:
                raise self._refusal(name, f"element {stored} of its {kind} on tensor rank {rank} is there not once")
            begin, stored = stored, stored + piece.length
            if max(first, begin) < min(last, stored):
                parts.append(piece.read(max(first, begin), min(last, stored)))
        if stored != math.prod(shape):
            raise self._refusal(name, f"its {kind} has {stored} elements on tensor rank {rank}, not {list(shape)}")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def _refusal(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._folder} does not hold {name} as {MANIFEST} describes it: {why}")


def _index_state_files(paths: Iterable[Path]) -> StoredPieces:
    pieces: StoredPieces = {}
    for path in paths:
        rank, stretches = list_stretches(path)
        for (kind, name), stretch in stretches.items():
            pieces.setdefault((kind, name, rank), []).append(stretch)
    return pieces


def _find_moves(stored: list[range], wanted: list[range], full_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield which elements of a slice go where in another: from, to and length along the dimension that is cut.

    Args:
        stored: What the one holds of the dimension, in its own order.
        wanted: What the other holds of it.
        full_size: The size of the dimension without padding, which does not go along.
    """
    begin = 0
    for source in stored:
        end = 0
        for target in wanted:
            first, last = max(source.start, target.start), min(source.stop, target.stop, full_size)
            if first < last:
                yield begin + first - source.start, end + first - target.start, last - first
            end += len(target)
        begin += len(source)

"""A copy in host memory of what a rank's files will hold, so that training can change it while they are written."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from megalibi.checkpoint.writing.rank_files import RankFiles

ELEMENT_BYTES = 4
"""Everything in a checkpoint is fp32."""


def count_snapshot_bytes(files: RankFiles) -> int:
    """Return how much host memory a copy of a rank's files takes."""
    stretches = (stretch for contents in files.contents.values() for stretch, _ in contents)
    return ELEMENT_BYTES * sum(stretch.length for stretch in stretches)


class Snapshot:
    """Host memory for a copy of a rank's files: made for the first copy, and used again for every later one.

    A copy is good until the next one is made.
    """

    def __init__(self) -> None:
        self._flats: dict[str, Tensor] = {}
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, self._pinned)

    def copy(self, files: RankFiles) -> RankFiles:
        """Return the same files with copies of their values; when it returns, the values may change.

        Raises:
            RuntimeError: There is not enough memory on the host, or the device has failed.
        """
        copied = {}
        devices = {values.device for contents in files.contents.values() for _, values in contents}
        for name, contents in files.contents.items():
            if name not in self._flats:
                flat = torch.empty(sum(stretch.length for stretch, _ in contents), dtype=torch.float32)
                if any(device.type == "cuda" for device in devices):
                    self._pin(flat)
                self._flats[name] = flat
            parts = self._flats[name].split([stretch.length for stretch, _ in contents])
            for part, (_, values) in zip(parts, contents, strict=True):
                part.copy_(values.detach(), non_blocking=True)
            copied[name] = [(stretch, part) for part, (stretch, _) in zip(parts, contents, strict=True)]
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return RankFiles(files.tensor_rank, copied)

    def _pin(self, flat: Tensor) -> None:
        """Let a GPU write to memory by itself: not by pin_memory=True, which rounds sizes up to a power of two."""
        if flat.numel():
            error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), ELEMENT_BYTES * flat.numel(), 0))
            if error:
                raise RuntimeError(f"the host's memory cannot be pinned: CUDA error {error}")
            self._pinned.append(flat.data_ptr())


def _unpin(pointers: list[int]) -> None:
    for pointer in pointers:
        torch.cuda.cudart().cudaHostUnregister(pointer)

"""A copy in host memory of what a rank's files will hold, so that training can change it while they are written."""

from __future__ import annotations

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

    def copy(self, files: RankFiles) -> RankFiles:
        """Return the same files with copies of their values; when it returns, the values may change.

        Raises:
            RuntimeError: There is not enough memory on the host, or the device has failed.
        """
        copied = {}
        devices = {values.device for contents in files.contents.values() for _, values in contents}
        for name, contents in files.contents.items():
            length = sum(stretch.length for stretch, _ in contents)
            if name not in self._flats or len(self._flats[name]) != length:
                self._flats[name] = _make_host_tensor(length, pinned=any(device.type == "cuda" for device in devices))
            parts = self._flats[name].split([stretch.length for stretch, _ in contents])
            for part, (_, values) in zip(parts, contents, strict=True):
                part.copy_(values.detach(), non_blocking=True)
            copied[name] = [(stretch, part) for part, (stretch, _) in zip(parts, contents, strict=True)]
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return RankFiles(files.tensor_rank, copied)


def _make_host_tensor(length: int, *, pinned: bool) -> Tensor:
    """Return memory for so many elements, which a GPU can write to by itself if it is pinned."""
    flat = torch.empty(length, dtype=torch.float32)
    if pinned and length:
        # Not pin_memory=True: torch's allocator rounds what it pins up to a power of two.
        error = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), ELEMENT_BYTES * length, 0)
        if int(error) != 0:
            raise RuntimeError(f"the host's memory cannot be pinned: CUDA error {int(error)}")
    return flat

"""Checkpoints without tensors, for the tests of what holds for any files."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalibi.checkpoint import Checkpoint, prune
from megalibi.checkpoint.folder import checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.config import Config, config_to_dict
from megalibi.files import make_folder, write_synced
from tests.support.runs import identify

TOPOLOGY = {"world_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1, "zero_stage": 1}
"""Of a rank that is alone."""


def save_files(folder: Path, step: int, content: str = "", keep: int = 0) -> Path:
    """Write a checkpoint of two small files, in the steps of save_checkpoint."""
    partial = folder / f"{checkpoint_name(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    files = {}
    for name in ("a.pt", "b.pt"):
        data = f"{name} of step {step} {content}".encode()
        write_synced(partial / name, data)
        files[name] = FileEntry(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        step=step, samples_consumed=0, topology=TOPOLOGY, config={}, derived={}, versions={}, files=files
    )
    final = commit(partial, manifest)
    prune(folder, keep)
    return final


def assert_whole(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint whose files are all as they were written."""
    assert checkpoint is not None
    opened = Checkpoint.open(checkpoint)
    assert list(opened.find_damage()) == []
    return opened.manifest.step


def write_checkpoint_without_tensors(folder: Path, config: Config, step: int = 2, samples_consumed: int = 0) -> Path:
    """Write a checkpoint of a run, which has all but the tensors."""
    partial = folder / f"step_{step:08d}.partial"
    make_folder(partial)
    return commit(
        partial,
        Manifest(
            step=step,
            samples_consumed=samples_consumed,
            topology=TOPOLOGY,
            config=config_to_dict(config),
            derived={},
            versions={},
            files={},
            data=identify(config).to_dict(),
        ),
    )


@contextlib.contextmanager
def counting_hashed_bytes() -> Iterator[list[int]]:
    """Count what this process hashes with SHA-256: a list that has one number, from the end on."""
    original, counted = hashlib.sha256, [0]

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._digest = original()
            self.update(data)

        def update(self, data: Any) -> None:
            counted[0] += memoryview(data).nbytes
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    hashlib.sha256 = Counting  # type: ignore[assignment,misc]
    try:
        yield counted
    finally:
        hashlib.sha256 = original  # type: ignore[misc]

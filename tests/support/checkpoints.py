"""Checkpoints without tensors, for the tests of what holds for any files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from megalibi.checkpoint import Checkpoint, prune
from megalibi.checkpoint.folder import checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.files import make_folder, write_synced


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
    manifest = Manifest(step=step, samples_consumed=0, topology={}, config={}, derived={}, versions={}, files=files)
    final = commit(partial, manifest)
    prune(folder, keep)
    return final


def assert_whole(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint whose files are all as they were written."""
    assert checkpoint is not None
    opened = Checkpoint.open(checkpoint)
    assert list(opened.find_damage()) == []
    return opened.manifest.step

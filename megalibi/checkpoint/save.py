"""Saving a DeepSpeed engine's state so that a crash at any moment leaves the last checkpoint loadable."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

import megalibi
from megalibi.checkpoint.folder import PARTIAL_SUFFIX, checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.checkpoint.parameters import describe_parameters, find_ties
from megalibi.config import Config, Derived, config_to_dict
from megalibi.data.tokens.identity import DataIdentity
from megalibi.errors import FileError, UserError
from megalibi.files import make_folder, sync_file
from megalibi.model import DTYPES
from megalibi.parallel import ProcessGroups, gather_objects


def save_checkpoint(
    engine: DeepSpeedEngine,
    config: Config,
    derived: Derived,
    data: DataIdentity,
    groups: ProcessGroups,
    *,
    folder: Path,
    step: int,
    run_id: str,
) -> Path:
    """Write a checkpoint; every rank must call it, and all see the same file system. No other one is deleted.

    Args:
        engine: The engine that build_engine returned.
        config: The run's configuration.
        derived: What followed from it.
        data: The identity of the run's text.
        groups: The groups of this process.
        folder: The run's ``checkpoints``.
        step: The number of optimizer steps done.
        run_id: The identity of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        FileError: On every rank, if a rank could not write or ``latest`` cannot be used; the checkpoints before are
            whole.
    """
    partial = folder / (checkpoint_name(step) + PARTIAL_SUFFIX)
    error = _prepare(partial) if groups.world.rank == 0 else None
    _raise_together(error, groups, partial)
    files, error = _write_states(engine, partial)
    files_by_rank = gather_objects(files, groups.world)
    _raise_together(error, groups, partial)

    def describe() -> Manifest:
        return Manifest(
            step=step,
            samples_consumed=step * config.train.global_batch_size,
            topology=describe_topology(config, groups),
            config=config_to_dict(config),
            derived=dataclasses.asdict(derived),
            versions={"megalibi": megalibi.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__},
            files=dict(sorted(item for files in files_by_rank for item in files.items())),
            data=data.to_dict(),
            run_id=run_id,
            parameters=describe_parameters(engine.module, DTYPES[config.train.precision]),
            ties=find_ties(engine.module),
        )

    if groups.world.rank == 0:
        error = _try_commit(partial, describe)
    _raise_together(error, groups, partial)
    return folder / checkpoint_name(step)


def describe_topology(config: Config, groups: ProcessGroups) -> dict[str, int]:
    """Return the sizes that decide which rank holds what."""
    return {
        "world_size": groups.world.size,
        "tensor_parallel_size": groups.tensor.size,
        "data_parallel_size": groups.data.size,
        "zero_stage": config.zero.stage,
    }


class _RecordingEngine(TorchCheckpointEngine):
    """Writes the files that DeepSpeed asks for, synced, and keeps their sizes and checksums.

    It keeps an error instead of raising it, because DeepSpeed goes on to a barrier: a rank that left would let the
    others wait there.
    """

    def __init__(self) -> None:
        self.files: dict[Path, FileEntry] = {}
        self.error: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        hashing = None
        try:
            with open(path, "wb") as file:
                hashing = _HashingFile(file)
                torch.save(state_dict, cast(BinaryIO, hashing))
                sync_file(file)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns an OSError into a RuntimeError
            self.error = self.error or f"{path}: {(hashing and hashing.error) or error}"
        else:
            self.files[Path(path)] = FileEntry(size_bytes=hashing.size_bytes, sha256=hashing.digest.hexdigest())


class _HashingFile(io.RawIOBase):
    """A file that hashes what passes through it on its way to the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def _prepare(partial: Path) -> str | None:
    """Make an empty folder to write into, and return what went wrong."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
    except OSError as error:
        return f"{partial}: {error}"
    return None


def _write_states(engine: DeepSpeedEngine, partial: Path) -> tuple[dict[str, FileEntry], str | None]:
    """Let DeepSpeed write this rank's files; return them by their path in the folder, and what went wrong."""
    recording = _RecordingEngine()
    original, engine.checkpoint_engine = engine.checkpoint_engine, recording
    # It would leave scripts beside the checkpoints that know nothing of tensor parallelism, and raise on a full disk.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
    finally:
        engine.checkpoint_engine = original
    files = {str(path.relative_to(partial)): entry for path, entry in recording.files.items()}
    return files, recording.error


def _try_commit(partial: Path, describe: Callable[[], Manifest]) -> str | None:
    """Turn the folder into a checkpoint that its manifest describes, and return what went wrong.

    It runs on one rank while the others wait: all that a user can mend is returned and not raised.
    """
    try:
        manifest = describe()
        for name, entry in manifest.files.items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != entry.size_bytes:
                place = "put train.output_dir on a disk of all hosts"
                return f"{path}: rank 0 does not see what another rank wrote; {place}"
        commit(partial, manifest)
    except OSError as error:
        return f"{partial}: {error}"
    except UserError as error:
        return str(error)
    return None


def _raise_together(error: str | None, groups: ProcessGroups, partial: Path) -> None:
    """Raise on every rank what any rank met, and remove the half-written folder."""
    met = [met for met in gather_objects(error, groups.world) if met is not None]
    if met:
        if groups.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise FileError(f"checkpoint not written, the one before it stays: {met[0]}")

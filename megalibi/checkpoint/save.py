"""Saving and loading a DeepSpeed engine's state so that a crash at any moment leaves the last checkpoint loadable."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any, BinaryIO, cast

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

import megalibi
from megalibi.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    PARTIAL_SUFFIX,
    FileEntry,
    Manifest,
    checkpoint_name,
    commit,
    find_damage,
    read_manifest,
)
from megalibi.checkpoint.reading import open_states, reading_only
from megalibi.config import Config, Derived, config_to_dict
from megalibi.data.tokens.identity import DataIdentity
from megalibi.errors import CheckpointError, ConfigError
from megalibi.files import make_folder, sync_file
from megalibi.parallel import ProcessGroups, gather_objects, refusing_together


class _RecordingEngine(TorchCheckpointEngine):
    """Writes the files that DeepSpeed asks for, synced, and keeps their sizes and checksums.

    It keeps an error instead of raising it, because DeepSpeed goes on to a barrier: a rank that left would let the
    others wait there.
    """

    def __init__(self) -> None:
        self.files: dict[Path, FileEntry] = {}
        self.error: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            with open(path, "wb") as file:
                hashing = _HashingFile(file)
                torch.save(state_dict, cast(BinaryIO, hashing))
                sync_file(file)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns an OSError into a RuntimeError
            self.error = self.error or f"{path}: {hashing.error or error}"
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
        engine: From build_engine.
        config: The run.
        derived: What followed from it.
        data: What it learns from.
        groups: Of this process.
        folder: The run's ``checkpoints``.
        step: Optimizer steps done.
        run_id: Of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: On every rank, if a rank could not write; the checkpoints before are whole.
    """
    partial = folder / (checkpoint_name(step) + PARTIAL_SUFFIX)
    recording = _RecordingEngine()
    error = _prepare(partial) if groups.world.rank == 0 else None
    _raise_together([error], groups, partial)
    ours, engine.checkpoint_engine = engine.checkpoint_engine, recording
    # It would leave scripts beside the checkpoints that know nothing of tensor parallelism, and raise on a full disk.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    finally:
        engine.checkpoint_engine = ours

    written = {str(path.relative_to(partial)): entry for path, entry in recording.files.items()}
    files_by_rank = gather_objects(written, groups.world)
    _raise_together([recording.error], groups, partial)
    error = None
    if groups.world.rank == 0:
        files = {name: entry for files in files_by_rank for name, entry in files.items()}
        manifest = Manifest(
            step=step,
            samples_consumed=step * config.train.global_batch_size,
            topology=topology(config, groups),
            config=config_to_dict(config),
            derived=dataclasses.asdict(derived),
            versions={"megalibi": megalibi.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__},
            files=dict(sorted(files.items())),
            data=data.to_dict(),
            run_id=run_id,
        )
        error = _try_commit(partial, manifest)
    _raise_together([error], groups, partial)
    return folder / checkpoint_name(step)


def _prepare(partial: Path) -> str | None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
    except OSError as error:
        return f"{partial}: {error}"
    return None


def _try_commit(partial: Path, manifest: Manifest) -> str | None:
    for name, entry in manifest.files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            return f"{path}: rank 0 does not see what another rank wrote; put train.output_dir on a disk of all hosts"
    try:
        commit(partial, manifest)
    except OSError as error:
        return f"{partial}: {error}"
    return None


def _raise_together(errors: list[str | None], groups: ProcessGroups, partial: Path) -> None:
    """Raise on every rank what any rank met, and remove the half-written folder."""
    met = [error for rank_errors in gather_objects(errors, groups.world) for error in rank_errors if error]
    if met:
        if groups.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint not written, the one before it stays: {met[0]}")


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, groups: ProcessGroups) -> Manifest:
    """Load weights, optimizer and loss scale; every rank must call it. Every file is verified first.

    Raises:
        ConfigError: On every rank; a file is missing, damaged, may not be read or would run code, and is named.
    """
    advice = f"; to resume from another checkpoint write its name into {LATEST}"
    with refusing_together(groups.world, checkpoint, advice):
        manifest = read_manifest(checkpoint)
        for damage in find_damage(checkpoint, manifest, part=groups.world.rank, parts=groups.world.size):
            raise ConfigError(damage)
    model_files, needed = _find_files(engine, checkpoint, groups)
    with refusing_together(groups.world, checkpoint, advice):
        for path in sorted(needed):
            if str(path.relative_to(checkpoint)) not in manifest.files:
                raise ConfigError(f"{path} is not in {MANIFEST}, which lists the files of the checkpoint")
            open_states(path, mmap=True)  # its tensors stay in the file: DeepSpeed reads them below
    with reading_only(engine, model_files, needed):
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    assert loaded is not None, checkpoint
    return manifest


def _find_files(engine: DeepSpeedEngine, checkpoint: Path, groups: ProcessGroups) -> tuple[list[Path], set[Path]]:
    """Return the model states of each tensor rank, and all files that DeepSpeed will load on this rank."""
    place = str(checkpoint.parent), checkpoint.name
    model_files = [Path(engine._get_ckpt_name(*place, mp_placeholder=f"{r:02d}")) for r in range(groups.tensor.size)]
    needed = {model_files[0], model_files[groups.tensor.rank]}  # the first tells it how many there are
    if engine.zero_optimization():
        needed.add(Path(engine._get_zero_ckpt_name(*place)))
    return model_files, needed


def topology(config: Config, groups: ProcessGroups) -> dict[str, int]:
    """Return the sizes that decide which rank holds what."""
    return {
        "world_size": groups.world.size,
        "tensor_parallel_size": groups.tensor.size,
        "data_parallel_size": groups.data.size,
        "zero_stage": config.zero.stage,
    }

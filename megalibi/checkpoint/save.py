"""Saving a DeepSpeed engine's state so that a crash at any moment leaves the last checkpoint loadable."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

import megalibi
from megalibi.checkpoint.folder import PARTIAL_SUFFIX, checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.checkpoint.parameters import describe_parameters, find_ties
from megalibi.checkpoint.tensors.state_file import (
    CONTENTS,
    WEIGHT,
    StateFileWriter,
    Stretch,
    cut_evenly,
    find_content,
    name_state_file,
)
from megalibi.config import Config, Derived, config_to_dict
from megalibi.data.tokens.identity import DataIdentity
from megalibi.engine.masters import Master, find_masters, read_progress
from megalibi.errors import FileError, UserError, describe_os_error
from megalibi.files import make_folder
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
    kind = config.optimizer.kind
    masters = find_masters(engine, kind)
    files, error = _write_states(masters, config.zero.stage, groups, partial)
    files_by_rank = gather_objects(files, groups.world)
    _raise_together(error, groups, partial)

    def describe() -> Manifest:
        return Manifest(
            step=step,
            samples_consumed=step * config.train.global_batch_size,
            topology=describe_topology(config, groups),
            config=config_to_dict(config),
            derived=dataclasses.asdict(derived),
            versions=describe_versions(),
            files=dict(sorted(item for files in files_by_rank for item in files.items())),
            data=data.to_dict(),
            run_id=run_id,
            parameters=describe_parameters(engine.module, DTYPES[config.train.precision]),
            ties=find_ties(engine.module),
            optimizer={"kind": kind, **dataclasses.asdict(read_progress(engine))},
        )

    if groups.world.rank == 0:
        error = _try_commit(partial, describe)
    _raise_together(error, groups, partial)
    return folder / checkpoint_name(step)


def describe_versions() -> dict[str, str]:
    """Return the versions of megalibi and of the packages that computed what a checkpoint holds."""
    return {"megalibi": megalibi.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def describe_topology(config: Config, groups: ProcessGroups) -> dict[str, int]:
    """Return the sizes that decide which rank holds what."""
    return {
        "world_size": groups.world.size,
        "tensor_parallel_size": groups.tensor.size,
        "data_parallel_size": groups.data.size,
        "zero_stage": config.zero.stage,
    }


def _prepare(partial: Path) -> str | None:
    """Make an empty folder to write into, and return what went wrong."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
    except OSError as error:
        return f"{partial}: {error}"
    return None


def _write_states(
    masters: Sequence[Master], stage: int, groups: ProcessGroups, partial: Path
) -> tuple[dict[str, FileEntry], str | None]:
    """Write what this rank's optimizer holds; return its files by name, and what went wrong.

    At ZeRO 0 all data ranks hold the same, and each writes its share.
    """
    contents: dict[str, list[tuple[Stretch, Tensor]]] = {content: [] for content in CONTENTS}
    for master in masters:
        share = range(len(master.weight))
        if stage == 0:
            share = cut_evenly(len(share), groups.data.size)[groups.data.rank]
        for kind, values in {WEIGHT: master.weight, **master.states}.items():
            stretch = Stretch(kind, master.name, master.start + share.start, len(share))
            contents[find_content(kind)].append((stretch, values[share.start : share.stop]))
    files = {}
    for content, stretches in contents.items():
        path = partial / name_state_file(content, groups.tensor.rank, groups.data.rank)
        try:
            writer = StateFileWriter(path, groups.tensor.rank, [stretch for stretch, _ in stretches])
            for _, values in stretches:
                writer.write(values)
            files[path.name] = writer.close()
        except OSError as error:
            return files, describe_os_error(error, path)
        except (RuntimeError, MemoryError) as error:  # of a device, or no memory for a copy on the host
            return files, f"{path}: {error}"
    return files, None


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

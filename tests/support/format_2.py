"""Writes checkpoints of format 2, as megalibi did when DeepSpeed wrote the files; imported in the ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.checkpoint.checkpoint import hash_file
from megalibi.checkpoint.folder import checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.checkpoint.parameters import describe_parameters, find_ties
from megalibi.checkpoint.writing.description import describe_topology
from megalibi.config import Config, config_to_dict, derive
from megalibi.files import make_folder
from megalibi.model import DTYPES
from megalibi.parallel import ProcessGroups, gather_objects
from megalibi.partial import PARTIAL_SUFFIX
from tests.support.runs import identify


def save_format_2(
    config: Config, engine: DeepSpeedEngine, groups: ProcessGroups, folder: str, step: int, run_id: str = "a"
) -> None:
    """Let DeepSpeed save into a folder of checkpoints, and describe its files; every rank calls it."""
    partial = Path(folder) / (checkpoint_name(step) + PARTIAL_SUFFIX)
    if groups.world.rank == 0:
        make_folder(partial)
    gather_objects(None, groups.world)
    engine._copy_recovery_script = lambda save_path: None
    engine.save_checkpoint(folder, tag=partial.name, save_latest=False)
    gather_objects(None, groups.world)
    parameters = describe_parameters(engine.module, DTYPES[config.train.precision])
    if groups.world.rank == 0:
        paths = sorted(partial.iterdir())
        files = {p.name: FileEntry(size_bytes=p.stat().st_size, sha256=hash_file(p)) for p in paths}
        manifest = Manifest(
            format_version=2,
            step=step,
            samples_consumed=step * config.train.global_batch_size,
            topology=describe_topology(config, groups),
            config=config_to_dict(config),
            derived=dataclasses.asdict(derive(config, groups.world.size)),
            versions={},
            files=files,
            data=identify(config).to_dict(),
            run_id=run_id,
            parameters=parameters,
            ties=find_ties(engine.module),
        )
        commit(partial, manifest)
    gather_objects(None, groups.world)

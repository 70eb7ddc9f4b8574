"""What a checkpoint says of itself: where it comes from, and what its files hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

import megalibi
from megalibi.checkpoint.manifest import Manifest
from megalibi.checkpoint.parameters import describe_parameters, find_ties
from megalibi.config import Config, Derived, config_to_dict
from megalibi.data.tokens.identity import DataIdentity
from megalibi.engine.masters import read_progress
from megalibi.metrics.records import RollbackRecord
from megalibi.model import DTYPES
from megalibi.parallel import ProcessGroups


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What the checkpoints of a run are made of, on this rank."""

    engine: DeepSpeedEngine
    """The engine that build_engine returned."""
    config: Config
    """The configuration of the run."""
    derived: Derived
    """The numbers that follow from it."""
    data: DataIdentity
    """The identity of the run's text."""
    groups: ProcessGroups
    """The groups of this process."""
    folder: Path
    """The folder ``checkpoints`` of the run, on a file system that all ranks see."""
    run_id: str
    """The identity of the run."""
    rollbacks: tuple[RollbackRecord, ...] = ()
    """The loss spikes that took the run back so far."""


def describe_checkpoint(run: SavedRun, step: int) -> Manifest:
    """Return the manifest of a checkpoint, without its files.

    Args:
        run: What the checkpoint is made of.
        step: The number of optimizer steps done.
    """
    config = run.config
    return Manifest(
        step=step,
        samples_consumed=step * config.train.global_batch_size,
        topology=describe_topology(config, run.groups),
        config=config_to_dict(config),
        derived=dataclasses.asdict(run.derived),
        versions=describe_versions(),
        files={},
        data=run.data.to_dict(),
        run_id=run.run_id,
        parameters=describe_parameters(run.engine.module, DTYPES[config.train.precision]),
        ties=find_ties(run.engine.module),
        optimizer={"kind": config.optimizer.kind, **dataclasses.asdict(read_progress(run.engine))},
        rollbacks=run.rollbacks,
    )


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

"""A checkpoint written anew for another topology, tensor by tensor: one tensor and its slices are in memory at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megalibi.checkpoint.checkpoint import Checkpoint
from megalibi.checkpoint.manifest import FORMAT_VERSION, Manifest, write_manifest
from megalibi.checkpoint.parameters import ParameterEntry, build_without_memory, describe_parameters, find_ties
from megalibi.checkpoint.tensors.saved_state import RankSlice
from megalibi.checkpoint.writing.description import describe_versions
from megalibi.checkpoint.writing.topology_files import allow_open_files, write_topology_files
from megalibi.config import Config, Derived, config_to_dict, derive
from megalibi.engine.masters import STATES
from megalibi.model import DTYPES
from megalibi.partial import writing_folder


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """What a checkpoint is on another topology."""

    data_parallel_size: int
    """The number of data ranks there."""
    config: Config
    """The configuration, with the new tensor parallel size and stage of ZeRO."""
    derived: Derived
    """What follows from the configuration."""
    parameters: dict[str, ParameterEntry]
    """Every parameter by name, as it is cut there."""
    ties: dict[str, str]
    """Further names of parameters that have several."""

    @property
    def tensor_parallel_size(self) -> int:
        """The number of ranks over which each layer is cut."""
        return self.config.parallel.tensor_parallel_size

    @property
    def topology(self) -> dict[str, int]:
        """As a manifest has it."""
        return {
            "world_size": self.derived.world_size,
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "zero_stage": self.config.zero.stage,
        }


def plan_reshard(
    checkpoint: Checkpoint, *, tensor_parallel_size: int, data_parallel_size: int, zero_stage: int
) -> ReshardPlan:
    """Return what a checkpoint would be on another topology, without reading its tensors.

    Args:
        checkpoint: The checkpoint.
        tensor_parallel_size: The number of ranks over which each layer shall be cut.
        data_parallel_size: The number of data ranks.
        zero_stage: What ZeRO shall cut.

    Raises:
        ConfigError: The model or the batch does not divide among so many ranks, and the field is named; or a process
            may not have so many files open.
    """
    allow_open_files(2 * tensor_parallel_size * data_parallel_size)
    old, batch = checkpoint.config, checkpoint.config.train.global_batch_size
    micro_batches = range(old.train.micro_batch_size, 0, -1)
    fitting = (size for size in micro_batches if batch % (size * data_parallel_size) == 0)  # a resume may change it
    config = dataclasses.replace(
        old,
        parallel=dataclasses.replace(old.parallel, tensor_parallel_size=tensor_parallel_size),
        zero=dataclasses.replace(old.zero, stage=zero_stage),
        train=dataclasses.replace(old.train, micro_batch_size=next(fitting, old.train.micro_batch_size)),
    )
    derived = derive(config, tensor_parallel_size * data_parallel_size)
    rows = derived.padded_vocab_size
    model = build_without_memory(config, padded_vocab_size=rows, tensor_parallel_size=tensor_parallel_size)
    return ReshardPlan(
        data_parallel_size=data_parallel_size,
        config=config,
        derived=derived,
        parameters=describe_parameters(model, DTYPES[config.train.precision]),
        ties=find_ties(model),
    )


def reshard(
    checkpoint: Checkpoint,
    output: Path,
    plan: ReshardPlan,
    *,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
    certify: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint for another topology. It has every bit of the weights and of the optimizer's states.

    Args:
        checkpoint: The checkpoint, of any format and topology.
        output: The new folder.
        plan: What it shall be there, of plan_reshard.
        show: Called before each parameter with its name, the number of those done, and of all.
        certify: Called with the folder when all is written, before it has its name; what it raises ends the work.

    Raises:
        ConfigError: A process may not have so many files open.
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        FileError: A file may not be read.
        OSError: The disk is full or fails.
    """
    checkpoint.verify()
    with writing_folder(output) as folder:
        write_manifest(folder, _write_files(checkpoint, folder, plan, show))
        certify(folder)


def _write_files(
    checkpoint: Checkpoint, folder: Path, plan: ReshardPlan, show: Callable[[str, int, int], None]
) -> Manifest:
    """Write all files, and return what describes them."""
    saved, size = checkpoint.read_state(), plan.tensor_parallel_size

    def read(name: str, kind: str, tensor: int) -> Tensor:
        entry = plan.parameters[name]
        length = math.prod(entry.local_shape(size))
        return saved.read_stretch(name, kind, 0, length, RankSlice(entry.shard, tensor, size))

    files = write_topology_files(
        folder,
        parameters=plan.parameters,
        states=STATES[plan.config.optimizer.kind],
        tensor_parallel_size=size,
        data_parallel_size=plan.data_parallel_size,
        read=read,
        show=show,
    )
    return dataclasses.replace(
        checkpoint.manifest,
        format_version=FORMAT_VERSION,
        topology=plan.topology,
        config=config_to_dict(plan.config),
        derived=dataclasses.asdict(plan.derived),
        versions=describe_versions(),
        files=files,
        parameters=plan.parameters,
        ties=plan.ties,
        optimizer={"kind": plan.config.optimizer.kind, **dataclasses.asdict(saved.read_progress())},
    )

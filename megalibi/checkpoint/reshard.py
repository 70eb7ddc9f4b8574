"""A checkpoint written anew for another topology, tensor by tensor: one tensor and its slices are in memory at once."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalibi.checkpoint.checkpoint import Checkpoint
from megalibi.checkpoint.folder import PARTIAL_SUFFIX
from megalibi.checkpoint.manifest import FORMAT_VERSION, Manifest, write_manifest
from megalibi.checkpoint.parameters import ParameterEntry, build_without_memory, describe_parameters, find_ties
from megalibi.checkpoint.tensors.saved_state import RankSlice
from megalibi.checkpoint.tensors.state_file import (
    CONTENTS,
    WEIGHT,
    StateFileWriter,
    Stretch,
    cut_evenly,
    find_content,
    name_state_file,
)
from megalibi.checkpoint.writing.description import describe_versions
from megalibi.config import Config, Derived, config_to_dict, derive
from megalibi.engine.masters import STATES
from megalibi.errors import ConfigError
from megalibi.files import make_folder, rename_synced, sync_folder
from megalibi.model import DTYPES

_OTHER_FILES = 64


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

    def cut(self, name: str) -> list[range]:
        """Return which elements of a tensor rank's slice of a parameter each data rank's file holds."""
        length = math.prod(self.parameters[name].local_shape(self.tensor_parallel_size))
        return cut_evenly(length, self.data_parallel_size)


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
        ConfigError: The model or the batch does not divide among so many ranks; the field is named.
    """
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
    _allow_open_files(2 * plan.derived.world_size)
    checkpoint.verify()
    partial = output.with_name(f"{output.name}{PARTIAL_SUFFIX}.{os.getpid()}")  # nobody else's
    make_folder(partial)
    try:
        write_manifest(partial, _write_files(checkpoint, partial, plan, show))
        certify(partial)
        sync_folder(partial)
        rename_synced(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(
    checkpoint: Checkpoint, folder: Path, plan: ReshardPlan, show: Callable[[str, int, int], None]
) -> Manifest:
    """Write all files, which grow side by side, and return what describes them."""
    saved = checkpoint.read_state()
    states = STATES[plan.config.optimizer.kind]
    writers = {
        (content, tensor, data): _open_writer(folder, plan, kinds, content, tensor, data)
        for content, kinds in zip(CONTENTS, ((WEIGHT,), states), strict=True)
        for tensor in range(plan.tensor_parallel_size)
        for data in range(plan.data_parallel_size)
    }
    for done, (name, entry) in enumerate(plan.parameters.items()):
        show(name, done, len(plan.parameters))
        parts = plan.cut(name)
        for kind in (WEIGHT, *states):
            content = find_content(kind)
            for tensor in range(plan.tensor_parallel_size):
                cut = RankSlice(entry.shard, tensor, plan.tensor_parallel_size)
                local = saved.read_stretch(name, kind, 0, parts[-1].stop, cut)
                for data, part in enumerate(parts):
                    writers[content, tensor, data].write(local[part.start : part.stop])
    return dataclasses.replace(
        checkpoint.manifest,
        format_version=FORMAT_VERSION,
        topology=plan.topology,
        config=config_to_dict(plan.config),
        derived=dataclasses.asdict(plan.derived),
        versions=describe_versions(),
        files={name_state_file(*place): writer.close() for place, writer in sorted(writers.items())},
        parameters=plan.parameters,
        ties=plan.ties,
        optimizer={"kind": plan.config.optimizer.kind, **dataclasses.asdict(saved.read_progress())},
    )


def _allow_open_files(number: int) -> None:
    """Let this process have so many files open beside those that it has.

    Raises:
        ConfigError: The system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"{number} files are written at once, and a process may have {hard} open: raise `ulimit -Hn`, or take "
            "fewer ranks"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_writer(
    folder: Path, plan: ReshardPlan, kinds: Sequence[str], content: str, tensor: int, data: int
) -> StateFileWriter:
    parts = [(name, plan.cut(name)[data]) for name in plan.parameters]
    stretches = [Stretch(kind, name, part.start, len(part)) for name, part in parts for kind in kinds]
    return StateFileWriter(folder / name_state_file(content, tensor, data), tensor, stretches)

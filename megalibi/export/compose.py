"""A checkpoint of weights that no run of ours has trained: at step 0, with an optimizer that has done nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import Manifest, write_manifest
from megalibi.checkpoint.parameters import ParameterEntry, build_without_memory, describe_parameters, find_ties
from megalibi.checkpoint.tensors.state_file import WEIGHT
from megalibi.checkpoint.writing.description import describe_versions
from megalibi.checkpoint.writing.topology_files import write_topology_files
from megalibi.config import Config, config_to_dict, derive
from megalibi.engine.ds_config import INITIAL_LOSS_SCALE_POWER
from megalibi.engine.masters import STATES, OptimizerProgress
from megalibi.model import DTYPES
from megalibi.parallel import shard


def describe_whole_model(config: Config) -> tuple[dict[str, ParameterEntry], dict[str, str]]:
    """Return every parameter by name as a checkpoint of a configuration has it, and further names of those tied."""
    size = config.parallel.tensor_parallel_size
    rows = derive(config, size).padded_vocab_size
    model = build_without_memory(config, padded_vocab_size=rows, tensor_parallel_size=size)
    return describe_parameters(model, DTYPES[config.train.precision]), find_ties(model)


def compose_checkpoint(
    folder: Path,
    config: Config,
    read_weight: Callable[[str], Tensor],
    *,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Manifest:
    """Write a checkpoint of one data rank at step 0 into an empty folder, tensor by tensor; the manifest comes last.

    Args:
        folder: An existing folder.
        config: The configuration of the run that could have trained the weights.
        read_weight: Returns a parameter by name: whole, without padding, in fp32.
        show: Called before each parameter with its name, the number of those done, and of all.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError: The model does not divide among parallel.tensor_parallel_size ranks, or a process may not have so
            many files open.
        OSError: The disk is full or fails.
    """
    size, kind = config.parallel.tensor_parallel_size, config.optimizer.kind
    derived = derive(config, size)
    parameters, ties = describe_whole_model(config)

    @lru_cache(maxsize=1)  # each rank asks for its slice
    def read_whole(name: str) -> Tensor:
        return read_weight(name)

    def read_slice(name: str, state: str, rank: int) -> Tensor:
        entry = parameters[name]
        if state != WEIGHT:
            return torch.zeros(math.prod(entry.local_shape(size)))
        whole = read_whole(name)
        return (whole if entry.shard is None else shard(whole, entry.shard, rank, size)).reshape(-1)

    files = write_topology_files(
        folder,
        parameters=parameters,
        states=STATES[kind],
        tensor_parallel_size=size,
        data_parallel_size=1,
        read=read_slice,
        show=show,
    )
    scale = 2.0**INITIAL_LOSS_SCALE_POWER if config.train.precision == "fp16" else 1.0
    progress = OptimizerProgress(updates=0, loss_scale=scale, good_steps=0)
    manifest = Manifest(
        step=0,
        samples_consumed=0,
        topology={
            "world_size": size,
            "tensor_parallel_size": size,
            "data_parallel_size": 1,
            "zero_stage": config.zero.stage,
        },
        config=config_to_dict(config),
        derived=dataclasses.asdict(derived),
        versions=describe_versions(),
        files=files,
        parameters=parameters,
        ties=ties,
        optimizer={"kind": kind, **dataclasses.asdict(progress)},
    )
    write_manifest(folder, manifest)
    return manifest

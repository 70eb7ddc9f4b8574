"""A checkpoint of weights that no run of ours has trained: at step 0, with an optimizer that has done nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import FileEntry, Manifest, write_manifest
from megalibi.checkpoint.parameters import ParameterEntry, build_without_memory, describe_parameters, find_ties
from megalibi.checkpoint.tensors.state_file import CONTENTS, WEIGHT, StateFileWriter, Stretch, name_state_file
from megalibi.checkpoint.writing.description import describe_versions
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


def compose_checkpoint(folder: Path, config: Config, read_weight: Callable[[str], Tensor]) -> Manifest:
    """Write a checkpoint of one data rank at step 0 into an empty folder, tensor by tensor; the manifest comes last.

    Args:
        folder: An existing folder.
        config: The configuration of the run that could have trained the weights.
        read_weight: Returns a parameter by name: whole, without padding, in fp32.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError: The model does not divide among parallel.tensor_parallel_size ranks.
        OSError: The disk is full or fails.
    """
    size, kind = config.parallel.tensor_parallel_size, config.optimizer.kind
    derived = derive(config, size)
    parameters, ties = describe_whole_model(config)
    kinds = dict(zip(CONTENTS, ((WEIGHT,), STATES[kind]), strict=True))
    writers = {
        (content, rank): _open_file(folder, parameters, kinds[content], content, rank, size)
        for content in CONTENTS
        for rank in range(size)
    }
    for name, entry in parameters.items():
        whole = read_weight(name)
        for rank in range(size):
            local = (whole if entry.shard is None else shard(whole, entry.shard, rank, size)).reshape(-1)
            for content in CONTENTS:
                for state in kinds[content]:
                    writers[content, rank].write(local if state == WEIGHT else torch.zeros_like(local))
    files: dict[str, FileEntry] = {}
    for (content, rank), writer in sorted(writers.items()):
        files[name_state_file(content, rank, 0)] = writer.close()
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


def _open_file(
    folder: Path, parameters: dict[str, ParameterEntry], kinds: tuple[str, ...], content: str, rank: int, size: int
) -> StateFileWriter:
    stretches = [
        Stretch(kind, name, 0, torch.Size(entry.local_shape(size)).numel())
        for name, entry in parameters.items()
        for kind in kinds
    ]
    return StateFileWriter(folder / name_state_file(content, rank, 0), rank, stretches)

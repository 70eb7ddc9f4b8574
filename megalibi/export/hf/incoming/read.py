"""A folder of Hugging Face as a checkpoint of ours, at step 0: to be evaluated, generated from, and trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalibi.checkpoint import IMPORTED_DATA, Checkpoint
from megalibi.checkpoint.checkpoint import hash_file
from megalibi.config import Config, DataConfig, DatasetConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megalibi.errors import CheckpointError, ConfigError
from megalibi.export.certificate import (
    CERTIFICATE,
    Certificate,
    TensorRecord,
    check_tensor_finite,
    hash_tensor,
    write_certificate,
)
from megalibi.export.comparison import check_comparison_memory, choose_text
from megalibi.export.compose import compose_checkpoint, describe_whole_model
from megalibi.export.hf.bias_rounding import describe_rounding
from megalibi.export.hf.incoming.config_json import ForeignModel, read_hf_config
from megalibi.export.hf.incoming.foreign import ForeignTensors
from megalibi.export.hf.software import TRANSFORMERS_VERSION, build_hf_model, load_hf_model
from megalibi.export.hf.trial import Sides, try_both
from megalibi.export.judge import check_equal, judge
from megalibi.files import read_json_object
from megalibi.partial import writing_folder

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_UNDECIDED = {
    *("dropout", "attention_dropout", "activation_dropout", "adaptive_softmax_dropout"),
    *("padded_vocab_size", "attention_backend", "init_std", "recompute"),
}
"""Fields of the model that a folder of others does not decide."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What a folder becomes."""

    folder: Path
    """The folder that is read."""
    fields: Mapping[str, Any]
    """What the folder's config.json says."""
    foreign: ForeignModel
    """The model that those fields describe."""
    tensors: ForeignTensors
    """The tensors of the folder."""
    config: Config
    """The configuration of the checkpoint."""
    notes: tuple[str, ...]
    """What a user should know besides, a sentence each."""
    rounds: bool
    """Whether the class computes another bias than ours will, and the user accepts it."""
    compare: bool
    """Whether both models are run on a text, where transformers is installed."""

    @property
    def seq_length(self) -> int:
        """The longer of both training lengths, in tokens: that of the folder and that of the run that goes on."""
        return max(self.foreign.seq_length, self.config.data.seq_length)


def plan_import(
    folder: Path,
    *,
    config: Config | None = None,
    tensor_parallel_size: int = 1,
    accept_rounded_bias: bool = False,
    compare: bool = True,
) -> ImportPlan:
    """Return what a folder of Hugging Face would become. Names and shapes of its tensors are checked, and none is read.

    Args:
        folder: The folder.
        config: The run that will go on from the checkpoint; None: none, the checkpoint is evaluated or converted.
        tensor_parallel_size: The number of ranks over which the checkpoint's layers are cut.
        accept_rounded_bias: Whether the model may have been trained with a bias in 16 bits, which ours is not.
        compare: Whether to run both models on a text.

    Raises:
        CheckpointError: A file is missing, damaged or would run code, or a tensor is missing, unknown or misshapen.
        ConfigError: The folder is of a model that ours cannot be, or not of the model of ``config``; or the host has
            no room for the comparison.
        FileError: A file may not be read.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: must be a folder of Hugging Face")
    fields = read_json_object(folder / "config.json")
    foreign = read_hf_config(fields, str(folder / "config.json"))
    tensors = ForeignTensors(folder)
    if foreign.model.num_layers > len(tensors.names):  # before a model of so many is built
        raise CheckpointError(f"{folder} holds {len(tensors.names):,} tensors, too few for its number of layers")
    parallel = ParallelConfig(tensor_parallel_size=tensor_parallel_size)
    if config is None:
        table = tensors.read(_find_first(foreign, tensors, folder))
        config = _invent_config(foreign, _PRECISIONS[table.dtype])
    else:
        _check_model(config.model, foreign.model)
        parallel = dataclasses.replace(config.parallel, tensor_parallel_size=tensor_parallel_size)
    config = dataclasses.replace(config, parallel=parallel)
    plan = ImportPlan(
        folder=folder,
        fields=fields,
        foreign=foreign,
        tensors=tensors,
        config=config,
        notes=(),
        rounds=False,
        compare=compare,
    )
    rounding = describe_rounding(foreign.known, foreign.model, plan.seq_length)
    if rounding is not None:
        if not accept_rounded_bias:
            raise ConfigError(f"{folder}: {rounding}, and ours does not: give --accept-rounded-bias if that may be")
        note = f"{rounding}, and ours does not; that was accepted when the checkpoint was written."
        plan = dataclasses.replace(plan, notes=(note,), rounds=True)
    _check_tensors(plan)
    as_long = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=plan.seq_length))
    check_comparison_memory(as_long, compare=compare and TRANSFORMERS_VERSION is not None)
    return plan


def convert_from_hf(
    plan: ImportPlan,
    output: Path,
    *,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write a checkpoint of the tensors of a folder, one after the other; the optimizer has done nothing there.

    Args:
        plan: What it shall be, of plan_import.
        output: The new folder.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as ``certificate.json`` in the folder has it.

    Raises:
        CheckpointError: A file is damaged or would run code.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    known, model = plan.foreign.known, plan.foreign.model
    before: dict[str, str] = {}

    def read_weight(name: str) -> Tensor:
        values = plan.tensors.read(known.rename(name)).float()
        check_tensor_finite(f"{plan.folder}: {known.rename(name)}", values)
        before[name] = hash_tensor(values)
        return known.to_ours(name, values, model.num_attention_heads)

    files = {name: hash_file(plan.folder / name) for name in ("config.json", *plan.tensors.all_files)}
    with writing_folder(output) as folder:
        compose_checkpoint(folder, plan.config, read_weight, show=show)
        checkpoint = Checkpoint.open(folder)
        records = _read_records(plan, checkpoint, before)
        check_equal(records, output)
        show("comparison", len(records), len(records))
        sides = Sides(
            known=known,
            load=lambda: _load(plan),
            name=plan.folder,
            checkpoint=checkpoint,
            is_import=True,
            rounds_bias=plan.rounds,
        )
        text = choose_text(2 * plan.seq_length, model.vocab_size, None)
        certificate = try_both(sides, text, compare=plan.compare).certify(
            source={"path": str(plan.folder), "format": known.name, "files": files},
            target={"format": "megalibi", "dtype": "float32", "manifest_sha256": checkpoint.manifest.checksum},
            tensors=records,
            ties=checkpoint.manifest.ties,
            notes=list(plan.notes),
        )
        judge(certificate, "the model of megalibi")
        write_certificate(certificate, folder / CERTIFICATE)
    return certificate


def _invent_config(foreign: ForeignModel, precision: str) -> Config:
    """Return the configuration of a run that never was: one step, of one sequence, on no data."""
    return Config(
        model=foreign.model,
        data=DataConfig(train=(DatasetConfig(prefix=IMPORTED_DATA),), seq_length=foreign.seq_length),
        optimizer=OptimizerConfig(learning_rate=0.0),
        train=TrainConfig(
            steps=1, global_batch_size=1, micro_batch_size=1, precision=precision, output_dir=IMPORTED_DATA
        ),
    )


def _check_model(ours: ModelConfig, theirs: ModelConfig) -> None:
    """Check that a run's model is that of a folder, but for what the folder does not decide."""
    for field in dataclasses.fields(ModelConfig):
        if field.name in _UNDECIDED:
            continue
        name = "has_norm_bias" if field.name == "norm_bias" else field.name
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(f"model.{field.name}={getattr(ours, name)}: must be {getattr(theirs, name)}, as in IN")


def _find_first(foreign: ForeignModel, tensors: ForeignTensors, folder: Path) -> str:
    name = foreign.known.rename("embedding.weight")
    if name not in tensors.names:
        raise CheckpointError(f"{folder} does not hold {name}")
    return name


def _check_tensors(plan: ImportPlan) -> None:
    """Check names and shapes of all tensors, and that a tied output layer is the embedding."""
    known, tensors, folder = plan.foreign.known, plan.tensors, plan.folder
    parameters, ties = describe_whole_model(plan.config)
    tied = {known.rename(name): known.rename(first) for name, first in ties.items()}
    expected = {known.rename(name): entry.shape for name, entry in parameters.items()}
    if missing := sorted(set(expected) - tensors.names):
        raise CheckpointError(f"{folder} does not hold {_name(missing)}")
    if unknown := sorted(tensors.names - set(expected) - set(tied)):
        raise CheckpointError(f"{folder} holds {_name(unknown)}, which {known.architecture} does not have")
    for name, shape in expected.items():
        if (found := tensors.read_shape(name)) != shape:
            raise CheckpointError(f"{folder}: {name} has the shape {list(found)}: must be {list(shape)}")
    for name, first in tied.items():
        if name in tensors.names and not torch.equal(tensors.read(name), tensors.read(first)):
            raise CheckpointError(f"{folder}: {name} is not {first}, to which config.json ties it")


def _name(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_records(plan: ImportPlan, checkpoint: Checkpoint, before: Mapping[str, str]) -> list[TensorRecord]:
    known, saved, heads = plan.foreign.known, checkpoint.read_state(), plan.foreign.model.num_attention_heads
    records = []
    for name in checkpoint.parameters:
        values = saved.read_whole(name)
        records.append(
            TensorRecord(
                source=known.rename(name),
                target=name,
                source_sha256=before[name],
                target_sha256=hash_tensor(values),
                bit_equal=hash_tensor(known.to_theirs(name, values, heads)) == before[name],
            )
        )
    return records


def _load(plan: ImportPlan) -> nn.Module:
    """Return the folder's model; of .bin files from what was read of them, which ran no code."""
    if plan.tensors.are_safetensors:
        return load_hf_model(plan.foreign.known, plan.folder)
    tensors = {name: plan.tensors.read(name).float() for name in plan.tensors.names}
    return build_hf_model(plan.foreign.known, plan.folder, plan.fields, tensors)

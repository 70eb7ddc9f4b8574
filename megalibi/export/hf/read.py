"""A folder of Hugging Face as a checkpoint of ours, at step 0: to be evaluated, generated from, and trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalibi.checkpoint import IMPORTED_DATA, Checkpoint
from megalibi.checkpoint.checkpoint import hash_file
from megalibi.config import Config, DataConfig, DatasetConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megalibi.errors import CheckpointError, ConfigError
from megalibi.export.certificate import (
    Certificate,
    LogitComparison,
    SlopeTables,
    TensorRecord,
    check_equal,
    check_logits,
    check_slopes,
    compare_slopes,
    describe_command,
    describe_date,
    describe_software,
    hash_tensor,
    write_certificate,
)
from megalibi.export.comparison import choose_text, compare_logits, compute_our_log_probs
from megalibi.export.compose import compose_checkpoint, describe_whole_model
from megalibi.export.hf.bias_rounding import find_bias_error, spell_rounding
from megalibi.export.hf.config_json import ForeignModel, read_hf_config
from megalibi.export.hf.foreign import ForeignTensors
from megalibi.export.hf.software import (
    TRANSFORMERS_VERSION,
    build_hf_model,
    compute_their_logits,
    explain_no_comparison,
    find_their_slopes,
    load_hf_model,
)
from megalibi.export.output import writing_folder
from megalibi.files import read_json_object
from megalibi.model import model_slopes

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


def plan_import(
    folder: Path, *, config: Config | None, tensor_parallel_size: int, accept_rounded_bias: bool
) -> ImportPlan:
    """Return what a folder of Hugging Face would become. Names and shapes of its tensors are checked, and none is read.

    Args:
        folder: The folder.
        config: The run that will go on from the checkpoint; None: none, the checkpoint is evaluated or converted.
        tensor_parallel_size: The number of ranks over which the checkpoint's layers are cut.
        accept_rounded_bias: Whether the model may have been trained with a bias in 16 bits, which ours is not.

    Raises:
        CheckpointError: A file is missing, damaged or would run code, or a tensor is missing, unknown or misshapen.
        ConfigError: The folder is of a model that ours cannot be, or not of the model of ``config``.
        FileError: A file may not be read.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: must be a folder of Hugging Face")
    fields = read_json_object(folder / "config.json")
    foreign = read_hf_config(fields, str(folder / "config.json"))
    tensors = ForeignTensors(folder)
    parallel = ParallelConfig(tensor_parallel_size=tensor_parallel_size)
    if config is None:
        table = tensors.read(_find_first(foreign, tensors, folder))
        config = _invent_config(foreign, _PRECISIONS[table.dtype])
    else:
        _check_model(config.model, foreign.model)
        parallel = dataclasses.replace(config.parallel, tensor_parallel_size=tensor_parallel_size)
    config = dataclasses.replace(config, parallel=parallel)
    notes = []
    tokens = 2 * foreign.seq_length
    if foreign.known.rounds_bias and (error := find_bias_error(foreign.model, tokens)):
        said = spell_rounding(foreign.model, tokens, error)
        if not accept_rounded_bias:
            raise ConfigError(f"{folder}: {said}, and ours does not: give --accept-rounded-bias if that may be")
        notes.append(f"{said}, and ours does not; that was accepted when the checkpoint was written.")
    plan = ImportPlan(folder=folder, fields=fields, foreign=foreign, tensors=tensors, config=config, notes=tuple(notes))
    _check_tensors(plan)
    return plan


def convert_from_hf(
    plan: ImportPlan,
    output: Path,
    *,
    compare: bool = True,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write a checkpoint of the tensors of a folder, one after the other; the optimizer has done nothing there.

    Args:
        plan: What it shall be, of plan_import.
        output: The new folder.
        compare: Whether to run both models on a text; see convert_to_hf for the memory that it needs.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as ``certificate.json`` in the folder has it.

    Raises:
        CheckpointError: A file is damaged or would run code.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    known, model, total = plan.foreign.known, plan.foreign.model, len(describe_whole_model(plan.config)[0])
    before: dict[str, str] = {}

    def read_weight(name: str) -> Tensor:
        show(name, len(before), total)
        values = plan.tensors.read(known.rename(name)).float()
        before[name] = hash_tensor(values)
        return known.to_ours(name, values, model.num_attention_heads)

    files = {name: hash_file(plan.folder / name) for name in ("config.json", *plan.tensors.files)}
    with writing_folder(output) as folder:
        compose_checkpoint(folder, plan.config, read_weight)
        checkpoint = Checkpoint.open(folder)
        records = _read_records(plan, checkpoint, before)
        check_equal(records, output)
        theirs = find_their_slopes(known, model)
        ours = model_slopes(model)
        slopes = SlopeTables(source=None, target=ours.tolist(), largest_difference=None)
        if theirs is not None:
            slopes = compare_slopes(theirs, ours)
        comparison = None
        not_compared = explain_no_comparison(compare=compare)
        if not_compared is None:
            show("comparison", total, total)
            comparison = _compare(plan, checkpoint)
        if not plan.notes:
            check_slopes(slopes, "the model of megalibi")
            if comparison is not None:
                check_logits(comparison, "the model of megalibi")
        certificate = Certificate(
            command=describe_command(),
            date=describe_date(),
            versions=describe_software(transformers=TRANSFORMERS_VERSION or "not installed"),
            source={"path": str(plan.folder), "format": known.name, "files": files},
            target={"format": "megalibi", "dtype": "float32", "manifest_sha256": checkpoint.manifest.checksum},
            tensors=records,
            ties=checkpoint.manifest.ties,
            slopes=slopes,
            comparison=comparison,
            not_compared=not_compared,
            notes=list(plan.notes),
        )
        write_certificate(certificate, folder)
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


def _compare(plan: ImportPlan, checkpoint: Checkpoint) -> LogitComparison:
    known, vocab_size = plan.foreign.known, plan.foreign.model.vocab_size
    text = choose_text(2 * plan.foreign.seq_length, vocab_size, None)
    if plan.tensors.are_safetensors:
        model = load_hf_model(known, plan.folder)
    else:
        names = plan.tensors.names
        model = build_hf_model(known, plan.fields, {name: plan.tensors.read(name).float() for name in names})
    theirs_SV = compute_their_logits(model, text.tokens)
    ours_SV = compute_our_log_probs(checkpoint, text.tokens)
    software = f"transformers {TRANSFORMERS_VERSION}, {known.architecture}, in float32 on the CPU"
    return compare_logits(theirs_SV, ours_SV, text, software=software, vocab_size=vocab_size)

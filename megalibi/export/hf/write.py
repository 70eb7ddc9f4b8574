"""A checkpoint as a folder that transformers' own classes load: written tensor by tensor, read back, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalibi.checkpoint import Checkpoint
from megalibi.checkpoint.tensors.safetensors_header import HeaderEntry
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError, DataError, FileError
from megalibi.export.certificate import (
    Certificate,
    LogitComparison,
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
from megalibi.export.fp32 import describe_source, list_ties
from megalibi.export.hf.bias_rounding import find_bias_error, spell_rounding
from megalibi.export.hf.card import make_card
from megalibi.export.hf.formats import SEQ_LENGTH_FIELD, HfFormat
from megalibi.export.hf.software import (
    TRANSFORMERS_VERSION,
    WHY_NOT,
    compute_their_logits,
    explain_no_comparison,
    find_their_slopes,
    load_hf_model,
)
from megalibi.export.output import DTYPE_NAMES, MAX_SHARD_BYTES, TensorFolder, read_back, writing_folder
from megalibi.files import write_synced
from megalibi.model import model_slopes

HF_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of weights that can be written, by PyTorch's names."""
_MAX_LENGTH_FACTOR = 16


@dataclass(frozen=True, kw_only=True)
class HfPlan:
    """What a checkpoint becomes."""

    known: HfFormat
    """The architecture that is written."""
    dtype: str
    """The type of the weights, as PyTorch names it."""
    max_length: int
    """The most tokens that the folder's config.json allows where its class has a cap."""
    notes: tuple[str, ...]
    """What a user should know besides, a sentence each."""
    rounds: bool
    """Whether the class computes another bias than the model was trained with, and the user accepts it."""


def plan_hf(
    checkpoint: Checkpoint, known: HfFormat, *, dtype: str, max_length: int | None, accept_rounded_bias: bool
) -> HfPlan:
    """Return what a checkpoint would become, from its manifest alone.

    Args:
        checkpoint: The checkpoint.
        known: The architecture.
        dtype: The type of the weights, a key of HF_DTYPES.
        max_length: The most tokens; None: 16 times the training length.
        accept_rounded_bias: Whether a class may compute the bias in 16 bits.

    Raises:
        ConfigError: The format cannot hold the model; the message names every field with the reason.
    """
    config = checkpoint.config
    refusals, notes = list(known.find_refusals(config.model)), []
    rounds = False
    if known.rounds_bias and not refusals:
        tokens = 2 * config.data.seq_length
        if error := find_bias_error(config.model, tokens):
            rounds, said = True, spell_rounding(config.model, tokens, error)
            if not accept_rounded_bias:
                refusals.append(f"{said}: give --accept-rounded-bias if that may be")
            notes.append(f"{said}; that was accepted when this folder was written.")
    if refusals:
        raise ConfigError("; ".join(refusals))
    length = _MAX_LENGTH_FACTOR * config.data.seq_length if max_length is None else max_length
    if length < config.data.seq_length:
        raise ConfigError(f"--max-length={length}: must be at least data.seq_length={config.data.seq_length}")
    return HfPlan(known=known, dtype=dtype, max_length=length, notes=tuple(notes), rounds=rounds)


def find_tokenizer(checkpoint: Checkpoint, given: Path | None) -> Tokenizer | WordTokenizer | None:
    """Return the tokenizer of a checkpoint; None: its file is not where the run had it, or is another one by now.

    Args:
        checkpoint: The checkpoint.
        given: What the user says it is; None: nothing.

    Raises:
        DataError: What the user gave is no tokenizer, or another one than the checkpoint's.
    """
    trained = checkpoint.manifest.data.get("tokenizer_sha256")
    if given is not None:
        tokenizer = load_tokenizer(given)
        if trained not in (None, tokenizer.fingerprint):
            raise DataError(
                f"--tokenizer={given} (sha256 {tokenizer.fingerprint[:12]}): must be the tokenizer that the checkpoint "
                f"was trained with (sha256 {trained[:12]})"
            )
        rows = checkpoint.config.model.vocab_size
        if tokenizer.vocab_size > rows:
            most = f"must have at most model.vocab_size={rows} ids"
            raise DataError(f"--tokenizer={given}: {most}, and has {tokenizer.vocab_size}")
        return tokenizer
    path = checkpoint.config.data.tokenizer
    if path is None or not Path(path).is_file():
        return None
    tokenizer = load_tokenizer(path)
    return tokenizer if trained in (None, tokenizer.fingerprint) else None


def convert_to_hf(
    checkpoint: Checkpoint,
    output: Path,
    plan: HfPlan,
    *,
    tokenizer: Tokenizer | WordTokenizer | None = None,
    compare: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write the fp32 weights that the optimizer steps on as a folder of Hugging Face; one tensor is in memory at once.

    The comparison at the end runs both models in fp32 on the CPU: it needs the memory of both, 8 bytes a parameter,
    and of both logits, 8 bytes for each token of the text and each of the vocabulary, twice over.

    Args:
        checkpoint: The checkpoint, of any topology.
        output: The new folder.
        plan: What it shall be, of plan_hf.
        tokenizer: That of the checkpoint; None: it is not at hand, and does not come along.
        compare: Whether to run both models on a text.
        max_shard_bytes: The most bytes of tensors in a file.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as ``certificate.json`` in the folder has it.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    checkpoint.verify()
    known, model = plan.known, checkpoint.config.model
    with writing_folder(output) as folder:
        notes = [*plan.notes, *_write_tokenizer(folder, tokenizer, checkpoint.config.data.seq_length)]
        records = _write_tensors(checkpoint, folder, plan, max_shard_bytes, show)
        check_equal(records, output)
        _write_json(folder / "config.json", make_config_json(checkpoint, plan, tokenizer))
        _write_json(folder / "generation_config.json", _make_generation_json(tokenizer))
        write_synced(folder / "README.md", make_card(checkpoint, known, plan.dtype, notes).encode())
        theirs = find_their_slopes(known, model)
        slopes = compare_slopes(model_slopes(model), theirs)
        comparison = None
        not_compared = explain_no_comparison(compare=compare)
        if not_compared is None:
            show("comparison", len(records), len(records))
            comparison = _compare(checkpoint, folder, plan, tokenizer)
        if not plan.rounds:
            check_slopes(slopes, known.architecture)
            if comparison is not None and plan.dtype == "float32":
                check_logits(comparison, known.architecture)
        certificate = Certificate(
            command=describe_command(),
            date=describe_date(),
            versions=describe_software(transformers=TRANSFORMERS_VERSION or "not installed"),
            source=describe_source(checkpoint),
            target={"format": known.name, "architecture": known.architecture, "dtype": plan.dtype},
            tensors=records,
            ties={known.rename(name): known.rename(first) for name, first in list_ties(checkpoint).items()},
            slopes=slopes,
            comparison=comparison,
            not_compared=not_compared,
            notes=notes,
        )
        write_certificate(certificate, folder)
    return certificate


def make_config_json(
    checkpoint: Checkpoint, plan: HfPlan, tokenizer: Tokenizer | WordTokenizer | None
) -> dict[str, Any]:
    """Return the fields of config.json."""
    model = checkpoint.config.model
    end = None if tokenizer is None else tokenizer.end_of_document_id
    return {
        "architectures": [plan.known.architecture],
        "model_type": plan.known.name,
        **plan.known.write_fields(model, plan.max_length),
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.layer_norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
        "dtype": plan.dtype,
        "torch_dtype": plan.dtype,  # as releases before 4.56 call it
        SEQ_LENGTH_FIELD: checkpoint.config.data.seq_length,
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | WordTokenizer | None, max_length: int) -> list[str]:
    """Write the tokenizer's files, and return why there are none in a sentence, if there are none."""
    if tokenizer is None:
        return ["No tokenizer came along: its file was not where the run had it, and --tokenizer did not say where."]
    if not TRANSFORMERS_VERSION:
        return [f"No tokenizer came along: {WHY_NOT}."]
    from megalibi.export.tokenizer_json import write_hf_tokenizer

    try:
        write_hf_tokenizer(Path(tokenizer.path), folder, max_length=max_length)
    except DataError as error:
        return [f"No tokenizer came along: {error}."]
    return []


def _make_generation_json(tokenizer: Tokenizer | WordTokenizer | None) -> dict[str, Any]:
    end = None if tokenizer is None else tokenizer.end_of_document_id
    return {"bos_token_id": end, "eos_token_id": end, "do_sample": True}


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    write_synced(path, (json.dumps(fields, indent=2) + "\n").encode())


def _write_tensors(
    checkpoint: Checkpoint, folder: Path, plan: HfPlan, max_shard_bytes: int, show: Callable[[str, int, int], None]
) -> list[TensorRecord]:
    known, dtype, heads = plan.known, HF_DTYPES[plan.dtype], checkpoint.config.model.num_attention_heads
    sources = {known.rename(name): name for name in checkpoint.parameters}
    entries = [
        HeaderEntry(target, DTYPE_NAMES[dtype], checkpoint.parameters[name].shape) for target, name in sources.items()
    ]
    tensors = TensorFolder(folder, entries, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    saved, before, rounded, differences = checkpoint.read_state(), {}, {}, {}
    for done, (target, name) in enumerate(sources.items()):
        show(name, done, len(sources))
        values = saved.read_whole(name)
        if not values.to(dtype).isfinite().all():
            raise FileError(
                f"--dtype={plan.dtype}: cannot hold {name}, whose largest number is {values.abs().max():.3g}"
            )
        differences[target] = (values.to(dtype).float() - values).abs().max().item()
        before[target], rounded[target] = hash_tensor(values), hash_tensor(values.to(dtype))
        tensors.write(known.to_theirs(name, values, heads).to(dtype))
    tensors.close()
    return [
        TensorRecord(
            source=sources[target],
            target=target,
            source_sha256=before[target],
            target_sha256=hash_tensor(values),
            bit_equal=hash_tensor(known.to_ours(sources[target], values, heads)) == rounded[target],
            largest_difference=differences[target],
        )
        for target, values in read_back(folder, tensors.files)
    ]


def _compare(
    checkpoint: Checkpoint, folder: Path, plan: HfPlan, tokenizer: Tokenizer | WordTokenizer | None
) -> LogitComparison:
    vocab_size = checkpoint.config.model.vocab_size
    text = choose_text(2 * checkpoint.config.data.seq_length, vocab_size, tokenizer)
    theirs_SV = compute_their_logits(load_hf_model(plan.known, folder), text.tokens)
    ours_SV = compute_our_log_probs(checkpoint, text.tokens)
    software = f"transformers {TRANSFORMERS_VERSION}, {plan.known.architecture}, in float32 on the CPU"
    return compare_logits(ours_SV, theirs_SV, text, software=software, vocab_size=vocab_size)

"""A checkpoint as a folder that transformers' own classes load: written tensor by tensor, read back, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalibi.checkpoint import Checkpoint
from megalibi.checkpoint.tensors.safetensors_header import HeaderEntry
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import FileError
from megalibi.export.certificate import (
    CERTIFICATE,
    Certificate,
    TensorRecord,
    check_tensor_finite,
    hash_tensor,
    write_certificate,
)
from megalibi.export.comparison import choose_text
from megalibi.export.fp32 import describe_source, list_ties
from megalibi.export.hf.card import make_card
from megalibi.export.hf.formats import SEQ_LENGTH_FIELD
from megalibi.export.hf.plan import HF_DTYPES, HfPlan
from megalibi.export.hf.software import load_hf_model, tokenize_with_transformers
from megalibi.export.hf.trial import Sides, try_both
from megalibi.export.judge import check_equal, judge
from megalibi.export.output import DTYPE_NAMES, MAX_SHARD_BYTES, TensorFolder, read_back
from megalibi.export.portable_tokenizer import ODD_TEXTS
from megalibi.files import write_synced
from megalibi.partial import writing_folder


def convert_to_hf(
    checkpoint: Checkpoint,
    output: Path,
    plan: HfPlan,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write the fp32 weights that the optimizer steps on as a folder of Hugging Face; one tensor is in memory at once.

    The comparison at the end runs both models in fp32 on the CPU: it needs the memory of both, 8 bytes a parameter,
    of their logits, 12 bytes for each token of the text and each of the vocabulary, and of the class's attention, 20
    bytes for each pair of tokens and each head.

    Args:
        checkpoint: The checkpoint, of any topology.
        output: The new folder.
        plan: What it shall be, of plan_hf.
        max_shard_bytes: The most bytes of tensors in a file.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as ``certificate.json`` in the folder has it.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        DataError: transformers would cut some text otherwise than the checkpoint's tokenizer.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    checkpoint.verify()
    with writing_folder(output) as folder:
        records = _write_tensors(checkpoint, folder, plan, max_shard_bytes, show)
        check_equal(records, output)
        num_texts = _write_other_files(checkpoint, folder, output, plan)
        show("comparison", len(records), len(records))
        certificate = _certify(checkpoint, folder, output, plan, records, num_texts)
        judge(certificate, plan.known.architecture)
        write_synced(folder / "README.md", make_card(checkpoint, plan, certificate).encode())
        write_certificate(certificate, folder / CERTIFICATE)
    return certificate


def _certify(
    checkpoint: Checkpoint,
    folder: Path,
    output: Path,
    plan: HfPlan,
    records: list[TensorRecord],
    num_texts: int | None,
) -> Certificate:
    """Compare both models, and return what came out."""
    known, config = plan.known, checkpoint.config
    sides = Sides(
        known=known,
        load=lambda: load_hf_model(known, folder, output),
        name=output,
        checkpoint=checkpoint,
        is_import=False,
        rounds_bias=plan.rounds,
        dtype=HF_DTYPES[plan.dtype],
    )
    text = choose_text(2 * config.data.seq_length, config.model.vocab_size, plan.found.tokenizer)
    return try_both(sides, text, compare=plan.compare).certify(
        source=describe_source(checkpoint),
        target={"format": known.name, "architecture": known.architecture, "dtype": plan.dtype},
        tensors=records,
        ties={known.rename(name): known.rename(first) for name, first in list_ties(checkpoint).items()},
        texts_of_same_ids=num_texts,
        notes=list(plan.notes),
    )


def make_config_json(checkpoint: Checkpoint, plan: HfPlan) -> dict[str, Any]:
    """Return the fields of config.json."""
    model, tokenizer = checkpoint.config.model, plan.found.tokenizer
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


def _write_other_files(checkpoint: Checkpoint, folder: Path, output: Path, plan: HfPlan) -> int | None:
    """Write config and tokenizer; return on how many texts its ids were compared, None if none comes along.

    Raises:
        FileError: transformers gives a text other ids than the tokenizer of the checkpoint.
    """
    tokenizer = plan.found.tokenizer
    _write_json(folder / "config.json", make_config_json(checkpoint, plan))
    _write_json(folder / "generation_config.json", _make_generation_json(tokenizer))
    if not plan.carries_tokenizer or tokenizer is None:
        return None
    from megalibi.export.tokenizer_json import write_hf_tokenizer

    write_hf_tokenizer(Path(tokenizer.path), folder, max_length=checkpoint.config.data.seq_length)
    for text, theirs in zip(ODD_TEXTS, tokenize_with_transformers(folder, ODD_TEXTS, output), strict=True):
        if theirs != tokenizer.encode(text):
            raise FileError(f"transformers gives the text {text!r} other ids than {tokenizer.path}: nothing is kept")
    return len(ODD_TEXTS)


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
        check_tensor_finite(name, values)
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

"""A checkpoint as a GGUF file, through llama.cpp's own writer: tensor by tensor, read back, and compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.config import ModelConfig
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.errors import ConfigError, FileError
from megalibi.export.certificate import (
    Certificate,
    TensorRecord,
    check_equal,
    check_slopes,
    compare_slopes,
    describe_command,
    describe_date,
    describe_software,
    hash_tensor,
)
from megalibi.export.comparison import check_probabilities, choose_text, compare_logits, compute_our_log_probs
from megalibi.export.fp32 import describe_source, list_ties
from megalibi.export.gguf.architectures import (
    MAX_ALIBI_BIAS,
    choose_architecture,
    compute_llama_slopes,
    find_gguf_refusals,
    rename_for_gguf,
)
from megalibi.export.gguf.llama import LLAMA_VERSION, WHY_NOT_LLAMA, compute_llama_logits
from megalibi.files import sync_folder, write_json
from megalibi.model import model_slopes

CERTIFICATE_SUFFIX = ".certificate.json"
"""What is added to the name of the file for that of its certificate."""
MAX_PROBABILITY_DIFFERENCES = {"f32": 1e-3, "f16": 1e-2}
"""The largest difference of two probabilities of a next token; above it a conversion fails. q8_0 has no such bound."""
_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
GGUF_TYPES = tuple(_TYPES)
"""The types of matrices that can be written; vectors are fp32 in all of them."""
_Q8_BLOCK = 32
_GELU_NOTE = "llama.cpp computes the GELU by tanh, from a table of half precision, in a file of any type."


class _Stored(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    def encode(self, values: Tensor) -> np.ndarray:
        """Return a parameter's numbers as the file holds them."""
        return gguf.quants.quantize(values.contiguous().numpy(), self.kind)


def check_gguf(model: ModelConfig, kind: str) -> None:
    """Check that llama.cpp can compute a model.

    Args:
        model: The network.
        kind: The type of the matrices, one of GGUF_TYPES.

    Raises:
        ConfigError: It cannot; the message names every field with the reason.
    """
    refusals = list(find_gguf_refusals(model))
    for field in ("hidden_size", "ffn_hidden_size"):
        if kind == "q8_0" and getattr(model, field) % _Q8_BLOCK:
            blocks = f"must be a multiple of {_Q8_BLOCK} for --type q8_0, whose blocks have so many numbers"
            refusals.append(f"model.{field}={getattr(model, field)}: {blocks}")
    if refusals:
        raise ConfigError("; ".join(refusals))


def convert_to_gguf(
    checkpoint: Checkpoint,
    output: Path,
    tokenizer: Tokenizer,
    *,
    kind: str = "f16",
    compare: bool = True,
    show: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Certificate:
    """Write the fp32 weights that the optimizer steps on as a GGUF file, and its certificate beside it.

    One tensor is in memory at once, but for the comparison at the end, which runs both models on the CPU.

    Args:
        checkpoint: The checkpoint, of any topology, which check_gguf has passed.
        output: The new file.
        tokenizer: That of the checkpoint.
        kind: The type of the matrices, one of GGUF_TYPES.
        compare: Whether to run both models on a text.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as the certificate has it.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    checkpoint.verify()
    partial = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        records = _write_file(checkpoint, partial, tokenizer, kind, show)
        check_equal(records, output)
        slopes = compare_slopes(
            model_slopes(checkpoint.config.model), compute_llama_slopes(checkpoint.config.model.num_attention_heads)
        )
        check_slopes(slopes, "llama.cpp")
        comparison = None
        not_compared = WHY_NOT_LLAMA if not LLAMA_VERSION else None if compare else "--no-compare was given"
        if not_compared is None:
            show("comparison", len(records), len(records))
            length, vocab_size = 2 * checkpoint.config.data.seq_length, checkpoint.config.model.vocab_size
            text = choose_text(length, vocab_size, tokenizer)
            comparison = compare_logits(
                compute_our_log_probs(checkpoint, text.tokens),
                compute_llama_logits(partial, text.tokens),
                text,
                software=f"llama-cpp-python {LLAMA_VERSION}, on the CPU, with a cache in fp32",
                vocab_size=vocab_size,
            )
            if kind in MAX_PROBABILITY_DIFFERENCES:
                check_probabilities(comparison, "llama.cpp", MAX_PROBABILITY_DIFFERENCES[kind])
        certificate = Certificate(
            command=describe_command(),
            date=describe_date(),
            versions=describe_software(gguf=_read_gguf_version()),
            source=describe_source(checkpoint),
            target={"format": "gguf", "architecture": choose_architecture(checkpoint.config.model), "dtype": kind},
            tensors=records,
            ties={rename_for_gguf(name): rename_for_gguf(first) for name, first in list_ties(checkpoint).items()},
            slopes=slopes,
            comparison=comparison,
            not_compared=not_compared,
            notes=[_GELU_NOTE],
        )
        write_json(dataclasses.asdict(certificate), Path(f"{output}{CERTIFICATE_SUFFIX}"))
        os.replace(partial, output)
        sync_folder(output.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return certificate


def _read_gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _write_file(
    checkpoint: Checkpoint, file: Path, tokenizer: Tokenizer, kind: str, show: Callable[[str, int, int], None]
) -> list[TensorRecord]:
    """Write the file, and return what is in it after it was read back."""
    matrices = _TYPES[kind][0]
    stored = {
        name: _Stored(
            rename_for_gguf(name), entry.shape, matrices if len(entry.shape) > 1 else gguf.GGMLQuantizationType.F32
        )
        for name, entry in checkpoint.parameters.items()
    }
    writer = gguf.GGUFWriter(file, choose_architecture(checkpoint.config.model))
    try:
        _add_facts(writer, checkpoint, kind)
        _add_tokenizer(writer, tokenizer, checkpoint.config.model.vocab_size)
        for tensor in stored.values():
            sample = tensor.encode(torch.zeros((1, *tensor.shape[1:])))  # of one row: the type of its numbers
            shape = (tensor.shape[0], *sample.shape[1:])
            size = sample.nbytes * tensor.shape[0]
            writer.add_tensor_info(tensor.name, shape, sample.dtype, size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        saved, hashes = checkpoint.read_state(), {}
        for done, (name, tensor) in enumerate(stored.items()):
            show(name, done, len(stored))
            values = saved.read_whole(name)
            encoded = tensor.encode(values)
            hashes[name] = hash_tensor(values), hash_tensor(torch.from_numpy(encoded))
            writer.write_tensor_data(encoded)
        writer.flush()
    finally:
        writer.close()
    with file.open("rb") as written:
        os.fsync(written.fileno())
    read_back = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    records = []
    for name, tensor in stored.items():
        found = hash_tensor(torch.from_numpy(np.array(read_back[tensor.name].data)))
        before, encoded_sha256 = hashes[name]
        records.append(
            TensorRecord(
                source=name,
                target=tensor.name,
                source_sha256=before,
                target_sha256=found,
                bit_equal=found == encoded_sha256 and tuple(read_back[tensor.name].shape[::-1]) == tensor.shape,
            )
        )
    return records


def _add_facts(writer: gguf.GGUFWriter, checkpoint: Checkpoint, kind: str) -> None:
    """Add what llama.cpp needs to know of the model, and what a reader may want to."""
    model, manifest = checkpoint.config.model, checkpoint.manifest
    steps = f"trained by megalibi for {manifest.step:,} steps, {manifest.samples_consumed:,} samples"
    writer.add_name(checkpoint.path.parent.parent.name or "megalibi")
    writer.add_description(f"{steps} of {checkpoint.config.data.seq_length:,} tokens")
    # ALiBi has no longest text: this is what it was trained on, which llama.cpp takes as its default.
    writer.add_context_length(checkpoint.config.data.seq_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_layer_norm_eps(model.layer_norm_epsilon)
    writer.add_max_alibi_bias(MAX_ALIBI_BIAS)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(_TYPES[kind][1])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the pieces, their scores and kinds; ids that the model has beyond the tokenizer's are unused."""
    content = Path(tokenizer.path).read_bytes()
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    pieces = [(piece.piece, piece.score, int(piece.type)) for piece in proto.pieces]
    unused = range(len(pieces), vocab_size)
    pieces += [(f"<unused {token}>", 0.0, int(gguf.TokenType.UNUSED)) for token in unused]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_eos_token_id(tokenizer.end_of_document_id)
    writer.add_bos_token_id(tokenizer.end_of_document_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)


def check_gguf_tokenizer(tokenizer: object, path: str) -> Tokenizer:
    """Return the tokenizer, if llama.cpp cuts every text as it does.

    Raises:
        ConfigError: It does not; the reason is named.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"{path}: a word-level vocabulary; a GGUF file needs a sentencepiece model")
    if not tokenizer.is_exact:
        raise ConfigError(f"{path}: changes texts before it cuts them; a GGUF file needs a model that does not")
    return tokenizer


def check_new_file(output: Path) -> None:
    """Check before the work that neither the file nor its certificate is there.

    Raises:
        FileError: One of them is.
    """
    for path in (output, Path(f"{output}{CERTIFICATE_SUFFIX}")):
        if os.path.lexists(path):
            raise FileError(f"OUT={path}: must not exist; give another file, or move that one")

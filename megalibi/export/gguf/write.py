"""A checkpoint as a GGUF file, through llama.cpp's own writer: tensor by tensor, read back, and compared."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.config import ModelConfig
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.errors import ConfigError, FileError
from megalibi.export.certificate import (
    CERTIFICATE,
    Bounds,
    Certificate,
    LogitComparison,
    TensorRecord,
    check_tensor_finite,
    compare_slopes,
    describe_software,
    hash_tensor,
    write_certificate,
)
from megalibi.export.comparison import (
    check_comparison_memory,
    choose_text,
    compare_logits,
    compute_our_log_probs,
)
from megalibi.export.fp32 import describe_source, list_ties
from megalibi.export.gguf.architectures import (
    choose_architecture,
    find_gguf_refusals,
    rename_for_gguf,
)
from megalibi.export.gguf.llama import LLAMA_VERSION, WHY_NOT_LLAMA, compute_llama_logits, tokenize_with_llama
from megalibi.export.gguf.metadata import add_model_facts, add_tokenizer_facts, read_alibi_slopes
from megalibi.export.judge import MAX_SLOPE_DIFFERENCE, check_equal, judge
from megalibi.export.portable_tokenizer import ODD_TEXTS, SPACE_SIGN, PortableTokenizer
from megalibi.files import sync_folder
from megalibi.model import model_slopes
from megalibi.partial import rename_new, sync_files, working_beside

CERTIFICATE_SUFFIX = ".certificate.json"
"""What is added to the name of the file for that of its certificate."""
MAX_PROBABILITY_DIFFERENCES = {"f32": 1e-3, "f16": 1e-2, "q8_0": 1e-1}
"""The largest difference of two probabilities of a next token; above it a conversion fails. In q8_0 llama.cpp rounds
the activations to 8 bits, too."""
_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
_NOTES = [
    "llama.cpp computes the GELU by tanh, from a table of half precision, in a file of any type.",
    "The slopes of the target are by llama.cpp's formula, which megalibi computes in fp32: that llama.cpp has them, "
    "only a comparison of probabilities can show.",
    "llama.cpp takes the sign U+2581 in a text for a space, where megalibi writes its bytes.",
]
"""What every certificate says besides."""


class _Stored(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    def encode(self, values: Tensor) -> np.ndarray:
        """Return a parameter's numbers as the file holds them."""
        return gguf.quants.quantize(values.contiguous().numpy(), self.kind)

    def measure_rounding(self, values: Tensor, encoded: np.ndarray) -> float:
        """Return the largest absolute difference between a parameter's numbers and what the file holds of them."""
        return (torch.from_numpy(gguf.quants.dequantize(encoded, self.kind)) - values).abs().max().item()


def check_gguf(model: ModelConfig, kind: str) -> None:
    """Check that llama.cpp can compute a model.

    Args:
        model: The network.
        kind: The type of the matrices, f32, f16 or q8_0; vectors are fp32 in all.

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
    portable: PortableTokenizer,
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
        portable: The tokenizer of the checkpoint, as check_portable returns it.
        kind: The type of the matrices, f32, f16 or q8_0; vectors are fp32 in all.
        compare: Whether to run both models on a text.
        show: Called before each tensor with its name, the number of those done, and of all.

    Returns:
        What came out, as the certificate has it.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
        ConfigError: The host has no room for the comparison.
        FileError: A file may not be read, or what came out is not the source: nothing is kept.
        OSError: The disk is full or fails.
    """
    check_comparison_memory(checkpoint.config, compare=compare and not WHY_NOT_LLAMA)
    checkpoint.verify()
    with working_beside(output) as folder:
        file, certified = folder / "model.gguf", folder / CERTIFICATE
        records = _write_file(checkpoint, file, portable, kind, show)
        check_equal(records, output)
        show("comparison", len(records), len(records))
        certificate = _certify(checkpoint, file, portable.tokenizer, records, kind, compare=compare)
        judge(certificate, "llama.cpp")
        write_certificate(certificate, certified)
        sync_files(folder)
        rename_new(file, output)  # whoever comes first has the name, and its certificate
        os.replace(certified, name_certificate(output))
        sync_folder(output.parent)
    return certificate


def name_certificate(output: Path) -> Path:
    """Return where the certificate of a file stands."""
    return Path(f"{output}{CERTIFICATE_SUFFIX}")


def _certify(
    checkpoint: Checkpoint, file: Path, tokenizer: Tokenizer, records: list[TensorRecord], kind: str, *, compare: bool
) -> Certificate:
    """Compare both tokenizers and both models, and return what came out."""
    model = checkpoint.config.model
    written = read_alibi_slopes(file, model.num_attention_heads)
    not_compared = WHY_NOT_LLAMA or (None if compare else "--no-compare was given")
    comparison = num_texts = bound = None
    if not_compared is None:
        num_texts = _check_ids(file, tokenizer)
        comparison = _compare(checkpoint, file, tokenizer)
        bound = MAX_PROBABILITY_DIFFERENCES[kind]
    return Certificate(
        versions=describe_software(gguf=version("gguf"), llama_cpp_python=LLAMA_VERSION),
        source=describe_source(checkpoint),
        target={"format": "gguf", "architecture": choose_architecture(model), "dtype": kind},
        tensors=records,
        ties={rename_for_gguf(name): rename_for_gguf(first) for name, first in list_ties(checkpoint).items()},
        slopes=compare_slopes(model_slopes(model), written),
        comparison=comparison,
        not_compared=not_compared,
        texts_of_same_ids=num_texts,
        bounds=Bounds(slopes=MAX_SLOPE_DIFFERENCE, probabilities=bound),
        notes=_NOTES,
    )


def _compare(checkpoint: Checkpoint, file: Path, tokenizer: Tokenizer) -> LogitComparison:
    """Run both models."""
    vocab_size = checkpoint.config.model.vocab_size
    text = choose_text(2 * checkpoint.config.data.seq_length, vocab_size, tokenizer)
    return compare_logits(
        compute_our_log_probs(checkpoint, text.tokens),
        compute_llama_logits(file, text.tokens),
        text,
        software=f"llama-cpp-python {LLAMA_VERSION}, on the CPU, with a cache in fp32",
        vocab_size=vocab_size,
    )


def _check_ids(file: Path, tokenizer: Tokenizer) -> int:
    """Check that llama.cpp gives the ids of the tokenizer to texts that are hard, where they have no sign U+2581.

    Returns:
        The number of texts.

    Raises:
        FileError: It does not.
    """
    texts = [text for text in ODD_TEXTS if SPACE_SIGN not in text]
    for text, theirs in zip(texts, tokenize_with_llama(file, texts), strict=True):
        if theirs != tokenizer.encode(text):
            raise FileError(f"llama.cpp gives the text {text!r} other ids than {tokenizer.path}: nothing is kept")
    return len(texts)


def _write_file(
    checkpoint: Checkpoint, file: Path, portable: PortableTokenizer, kind: str, show: Callable[[str, int, int], None]
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
        add_model_facts(writer, checkpoint, _TYPES[kind][1])
        add_tokenizer_facts(writer, portable, checkpoint.config.model.vocab_size)
        for tensor in stored.values():
            sample = tensor.encode(torch.zeros((1, *tensor.shape[1:])))  # of one row: the type of its numbers
            shape = (tensor.shape[0], *sample.shape[1:])
            size = sample.nbytes * tensor.shape[0]
            writer.add_tensor_info(tensor.name, shape, sample.dtype, size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        saved, hashes, rounding = checkpoint.read_state(), {}, {}
        for done, (name, tensor) in enumerate(stored.items()):
            show(name, done, len(stored))
            values = saved.read_whole(name)
            check_tensor_finite(name, values)
            encoded = tensor.encode(values)
            hashes[name] = hash_tensor(values), hash_tensor(torch.from_numpy(encoded))
            rounding[name] = tensor.measure_rounding(values, encoded)
            if not math.isfinite(rounding[name]):
                raise FileError(f"--type={kind}: cannot hold {name}, whose largest number is {values.abs().max():.3g}")
            writer.write_tensor_data(encoded)
        writer.flush()
    finally:
        writer.close()
    return _read_records(file, stored, hashes, rounding)


def _read_records(
    file: Path, stored: dict[str, _Stored], hashes: dict[str, tuple[str, str]], rounding: dict[str, float]
) -> list[TensorRecord]:
    """Read the file back, and return what is in it.

    Args:
        file: The whole file.
        stored: What should be in it, by our names.
        hashes: The SHA-256 of each tensor, in fp32 and as it was encoded.
        rounding: The largest difference that the encoding of each made.
    """
    read_back = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    records = []
    for name, tensor in stored.items():
        entry = read_back[tensor.name]
        # Not through the reader's map of the file, of which every page that was read would stay.
        content = np.fromfile(file, np.uint8, int(entry.n_bytes), offset=int(entry.data_offset))
        found = hash_tensor(torch.from_numpy(content))
        before, encoded_sha256 = hashes[name]
        records.append(
            TensorRecord(
                source=name,
                target=tensor.name,
                source_sha256=before,
                target_sha256=found,
                bit_equal=found == encoded_sha256 and tuple(entry.shape[::-1]) == tensor.shape,
                largest_difference=rounding[name],
            )
        )
    return records

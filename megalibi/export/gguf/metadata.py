"""What a GGUF file says beside its tensors: what the model is, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor

from megalibi.checkpoint import CHECKPOINTS, Checkpoint
from megalibi.export.gguf.architectures import MAX_ALIBI_BIAS, compute_llama_slopes
from megalibi.export.portable_tokenizer import PortableTokenizer


def add_model_facts(writer: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: gguf.LlamaFileType) -> None:
    """Add what llama.cpp needs to know of the model, and what a reader may want to.

    Args:
        writer: Of the file.
        checkpoint: What is written.
        file_type: The type of the matrices, as llama.cpp calls it.
    """
    model, manifest = checkpoint.config.model, checkpoint.manifest
    steps = f"trained by megalibi for {manifest.step:,} steps, {manifest.samples_consumed:,} samples"
    is_of_run = checkpoint.path.parent.name == CHECKPOINTS
    writer.add_name(checkpoint.path.parent.parent.name if is_of_run else "megalibi")
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
    writer.add_file_type(file_type)


def read_alibi_slopes(file: Path, num_heads: int) -> Tensor:
    """Return the slopes that llama.cpp computes from what a file says, fp32 [heads]; 0 where it says nothing.

    Args:
        file: The file.
        num_heads: The number of heads that it should say.
    """
    fields = gguf.GGUFReader(file).fields
    said = {name.partition(".")[2]: field for name, field in fields.items()}
    bias, heads = said.get("attention.max_alibi_bias"), said.get("attention.head_count")
    if bias is None or heads is None or heads.contents() != num_heads:
        return torch.zeros(num_heads)
    return compute_llama_slopes(num_heads, bias.contents())


def add_tokenizer_facts(writer: gguf.GGUFWriter, portable: PortableTokenizer, vocab_size: int) -> None:
    """Add the pieces, their scores and kinds; ids that the model has beyond the tokenizer's are unused.

    Args:
        writer: Of the file.
        portable: The tokenizer with its model.
        vocab_size: The ids that the model has.
    """
    tokenizer, proto = portable
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

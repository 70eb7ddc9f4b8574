"""What a GGUF file says beside its tensors: what the model is, and its tokenizer."""

from __future__ import annotations

import gguf

from megalibi.checkpoint import Checkpoint
from megalibi.export.gguf.architectures import MAX_ALIBI_BIAS
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
    writer.add_file_type(file_type)


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

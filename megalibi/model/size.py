"""How large a model is and how much arithmetic a step takes: closed formulas, without torch."""

from __future__ import annotations

from megalibi.config import ModelConfig, adaptive_bands


def count_parameters(model: ModelConfig, padded_vocab_size: int | None = None) -> int:
    """Return the number of parameters; the embedding table counts once when it is tied.

    Args:
        model: The network.
        padded_vocab_size: Rows of the embedding table; None counts the vocabulary without padding, as is always
            done for adaptive bands.
    """
    if model.adaptive_cutoffs:
        tables = _adaptive_elements(model)
    else:
        vocabulary = padded_vocab_size or model.vocab_size
        tables = vocabulary * model.hidden_size * (1 if model.tie_embeddings else 2)
    num_norms = 2 * model.num_layers + int(model.final_norm) + int(model.embedding_norm)
    norms = num_norms * model.hidden_size * (2 if model.has_norm_bias else 1)
    biases = model.num_layers * (5 * model.hidden_size + model.ffn_hidden_size) if model.bias else 0
    return tables + model.num_layers * _block_matrix_elements(model) + norms + biases + _position_elements(model)


def _position_elements(model: ModelConfig) -> int:
    """Return the elements of the tables of positions that are learned."""
    if model.position_method == "t5_bias":
        return model.num_attention_heads * model.t5_num_buckets
    return model.max_position_embeddings * model.hidden_size  # 0 rows unless positions are learned


def _adaptive_elements(model: ModelConfig) -> int:
    first, *tails = adaptive_bands(model)
    tables = sum(band.size * band.width for band in (first, *tails))
    tail_projections = sum(band.width for band in tails) * model.hidden_size
    embedding = tables + model.hidden_size**2 + tail_projections
    untied = 0 if model.tie_embeddings else tables + tail_projections
    return embedding + len(tails) * model.hidden_size + untied


def _vocabulary_matrix_elements(model: ModelConfig) -> int:
    """Return the elements of the output layer, or of what each token meets of an adaptive one.

    That is the projections of the embedding and the head. A later band meets only its own tokens, and those are few.
    """
    if not model.adaptive_cutoffs:
        return model.vocab_size * model.hidden_size
    first, *tails = adaptive_bands(model)
    projections = sum(band.width for band in (first, *tails))
    return (projections + first.size + len(tails)) * model.hidden_size


def _block_matrix_elements(model: ModelConfig) -> int:
    return 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size


def model_flops_per_token(model: ModelConfig, seq_length: int, *, causal: bool) -> float:
    """Return the floating point operations of forward and backward per token: the model's, not the hardware's.

    6 x (elements of all weight matrices, the output layer included, the embedding look-up and later adaptive bands not)
    + 12 x layers x hidden_size x seq_length for the scores and their product with v.

    With ``causal`` the second term counts only the (seq_length + 1) / 2 keys that a query sees on average; without, all
    of them, as Megatron-LM does (arXiv:2104.04473, section 5.1). Recomputation is not counted, nor are the bias, norms
    and softmax: they are below 1%.

    Args:
        model: The network.
        seq_length: Tokens per sequence.
        causal: Count only the half of the scores that a causal model uses.
    """
    matrices = model.num_layers * _block_matrix_elements(model) + _vocabulary_matrix_elements(model)
    keys = (seq_length + 1) / 2 if causal else seq_length
    return 6.0 * matrices + 12.0 * model.num_layers * model.hidden_size * keys


def recomputed_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Return the floating point operations per token that activation checkpointing adds, attention counted in full.

    It runs the forward pass of every block once more: a third of what ``model_flops_per_token`` counts of the blocks.
    What a fused attention kernel computes again in its own backward pass is not counted.

    Args:
        model: The network.
        seq_length: Tokens per sequence.
    """
    if model.recompute == "none":
        return 0.0
    return model.num_layers * (2.0 * _block_matrix_elements(model) + 4.0 * model.hidden_size * seq_length)

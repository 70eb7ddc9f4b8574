"""How large a model is and how much arithmetic a step takes: closed formulas, without torch."""

from __future__ import annotations

from megalibi.config import ModelConfig


def count_parameters(model: ModelConfig, padded_vocab_size: int | None = None) -> int:
    """Return the number of parameters; the embedding table counts once when it is tied.

    Args:
        model: The network.
        padded_vocab_size: Rows of the embedding table; None counts the vocabulary without padding.
    """
    vocabulary = padded_vocab_size or model.vocab_size
    tables = vocabulary * model.hidden_size * (1 if model.tie_embeddings else 2)
    norms = (2 * model.num_layers + 1) * model.hidden_size * (2 if model.bias else 1)
    biases = model.num_layers * (5 * model.hidden_size + model.ffn_hidden_size) if model.bias else 0
    return tables + model.num_layers * _block_matrix_elements(model) + norms + biases


def _block_matrix_elements(model: ModelConfig) -> int:
    return 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size


def model_flops_per_token(model: ModelConfig, seq_length: int, *, causal: bool) -> float:
    """Return the floating point operations of forward and backward per token: the model's, not the hardware's.

    6 x (elements of all weight matrices, the output layer included, the embedding look-up not)
    + 12 x layers x hidden_size x seq_length for the scores and their product with v.

    With ``causal`` the second term counts only the (seq_length + 1) / 2 keys that a query sees on average; without, all
    of them, as Megatron-LM does (arXiv:2104.04473, section 5.1). Recomputation is not counted, nor are the bias, norms
    and softmax: they are below 1%.

    Args:
        model: The network.
        seq_length: Tokens per sequence.
        causal: Count only the half of the scores that a causal model uses.
    """
    matrices = model.num_layers * _block_matrix_elements(model) + model.vocab_size * model.hidden_size
    keys = (seq_length + 1) / 2 if causal else seq_length
    return 6.0 * matrices + 12.0 * model.num_layers * model.hidden_size * keys

"""From the configuration to both ends of the model: one table for the whole vocabulary, or adaptive bands."""

from __future__ import annotations

from megalibi.config import ModelConfig
from megalibi.model.vocabulary.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megalibi.model.vocabulary.table import TableEmbedding, TableOutput
from megalibi.parallel import Group, Layout

Embedding = TableEmbedding | AdaptiveEmbedding
Output = TableOutput | AdaptiveSoftmax


def build_embedding(model: ModelConfig, padded_vocab_size: int, group: Group) -> Embedding:
    """Return what turns token ids into hidden states, whole on every rank of the tensor group.

    Args:
        model: The network.
        padded_vocab_size: Rows of the table; adaptive bands are padded each on its own.
        group: The tensor group.
    """
    if model.adaptive_cutoffs:
        return AdaptiveEmbedding(model, group=group)
    return TableEmbedding(model, padded_vocab_size, group=group)


def build_output(model: ModelConfig, padded_vocab_size: int, embedding: Embedding, layout: Layout) -> Output:
    """Return what turns hidden states into the loss of each token.

    Args:
        model: The network.
        padded_vocab_size: Rows of the table; adaptive bands are padded each on its own.
        embedding: The embedding, whose weights are used here too if the model ties them.
        layout: How the ranks share the hidden states.
    """
    if isinstance(embedding, AdaptiveEmbedding):
        return AdaptiveSoftmax(model, embedding, layout=layout)
    return TableOutput(model, padded_vocab_size, embedding, layout=layout)

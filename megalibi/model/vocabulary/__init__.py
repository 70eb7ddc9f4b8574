"""Both ends of the model: the embedding of the tokens, and the output layer with the loss over the vocabulary."""

from megalibi.model.vocabulary.build import build_embedding, build_output

__all__ = ["build_embedding", "build_output"]

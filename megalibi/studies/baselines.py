"""How the positions that ALiBi is compared with are given their best, and how a study's results say so."""

from __future__ import annotations

import dataclasses

from megalibi.config import ModelConfig


def replace_positions(model: ModelConfig, method: str, *, longest: int = 0) -> ModelConfig:
    """Return a study's model with other positions; model.scale_embedding is of its sinusoidal models alone.

    Args:
        model: The section ``model`` of the study's run.
        method: The position method.
        longest: Tokens that learned positions reach; 0 for all others.

    Raises:
        ConfigError: The other fields of the model do not allow this method.
    """
    return dataclasses.replace(
        model,
        position_method=method,
        max_position_embeddings=longest,
        scale_embedding=model.scale_embedding and method == "sinusoidal",
    )


def describe_sinusoidal(model: ModelConfig) -> str:
    """Return how large tokens and sinusoidal positions are beside each other when a model begins."""
    tokens = "multiplied by sqrt(hidden size)" if model.multiplies_tokens else "as they are"
    said = f"Sinusoidal: tokens {tokens} beside a table of amplitude {model.sinusoidal_table_amplitude:g}"
    if model.multiplies_tokens and model.sinusoidal_table_amplitude == 1.0:
        return f"{said}, as in the paper's code."
    return f"{said}; in the paper's code the tokens are multiplied by sqrt(hidden size), and the amplitude is 1."


def describe_t5_bias(model: ModelConfig) -> str:
    """Return how fast T5's numbers learn."""
    return f"T5 bias: the learned numbers times {model.t5_bias_scale:g}, and weight decay spares them."

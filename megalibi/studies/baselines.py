"""How the positions that ALiBi is compared with were given their best, in the words of a study's results."""

from __future__ import annotations

from megalibi.config import ModelConfig


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

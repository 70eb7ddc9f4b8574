"""The slopes of ALiBi, one per attention head.

Source: Press, Smith, Lewis, "Train Short, Test Long" (arXiv:2108.12409), section 3; for head counts that are no power
of two, ``get_slopes`` of the authors' code (github.com/ofirpress/attention_with_linear_biases).
"""

from __future__ import annotations

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Return the slope of every head, fp32, shape [num_heads].

    A power of two n gives 2^(-8/n), 2^(-16/n), ..., 2^(-8). Any other count takes the slopes of the next lower power
    of two and then every second slope of twice that power.

    Raises:
        ValueError: ``num_heads`` is less than 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: must be at least 1")
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = _geometric_slopes(power) + _geometric_slopes(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float64).to(torch.float32)


def local_slopes(num_heads: int, start: int, count: int) -> torch.Tensor:
    """Return the slopes of the heads ``start`` ... ``start + count - 1`` of a model of ``num_heads`` heads.

    A tensor-parallel rank that holds some of the heads asks by their global ids: ``alibi_slopes`` of its local number
    of heads would give every rank the same, wrong slopes.

    Args:
        num_heads: Number of heads of the whole model.
        start: Global id of the first local head.
        count: Number of local heads.

    Raises:
        ValueError: The range is empty or does not lie inside the model's heads.
    """
    if start < 0 or count < 1 or start + count > num_heads:
        raise ValueError(f"start={start}, count={count}: must name heads within 0..{num_heads - 1}")
    return alibi_slopes(num_heads)[start : start + count]


def _geometric_slopes(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]

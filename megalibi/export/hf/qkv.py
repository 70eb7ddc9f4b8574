"""The order of the rows of a fused query-key-value layer.

Shapes: H heads, K head dimension. Ours is [q; k; v], each of H x K rows, as MPT has it. Bloom and Falcon keep the three
of a head together: H x [q; k; v], each of K rows.
"""

from __future__ import annotations

from torch import Tensor


def interleave_heads(fused: Tensor, num_heads: int) -> Tensor:
    """Return the rows in the order of Bloom and Falcon.

    Args:
        fused: Weight [3HK, ...] or bias [3HK] in our order.
        num_heads: The number of heads, H.
    """
    return fused.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def separate_heads(fused: Tensor, num_heads: int) -> Tensor:
    """Return the rows in our order: the inverse of ``interleave_heads``.

    Args:
        fused: Weight [3HK, ...] or bias [3HK] in the order of Bloom and Falcon.
        num_heads: The number of heads, H.
    """
    return fused.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)

"""A random order of any number of samples that is computed, not stored."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from megalibi.data.hashing import UInt64Array, hash64

# Luby & Rackoff need 4 rounds for a permutation that cannot be told from a random one; 8 leave a margin for small sets.
_ROUNDS = 8


def permute(indices: npt.NDArray[np.int64], size: int, key: UInt64Array) -> npt.NDArray[np.int64]:
    """Map indices to their places in a keyed permutation of [0, size), in memory that does not grow with size.

    A Feistel network on a grid of about sqrt(size) x sqrt(size) cells permutes the grid; an image outside [0, size) is
    sent through again until it falls inside ("cycle walking", Black & Rogaway 2002, sections 3 and 4).

    Args:
        indices: Indices in [0, size).
        size: Number of elements that are permuted, at least 1.
        key: One key, or one for each index.
    """
    num_rows = math.isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)  # fewer than num_rows of the cells lie outside, so walks are short
    keys = np.broadcast_to(key, indices.shape)
    images = _permute_grid(indices.astype(np.uint64), num_rows, num_columns, keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _permute_grid(images[outside], num_rows, num_columns, keys[outside])
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _permute_grid(cells: UInt64Array, num_rows: int, num_columns: int, keys: UInt64Array) -> UInt64Array:
    rows, columns = np.divmod(cells, np.uint64(num_columns))
    for round_number in range(0, _ROUNDS, 2):
        rows = (rows + hash64(keys, round_number, columns) % np.uint64(num_rows)) % np.uint64(num_rows)
        columns = (columns + hash64(keys, round_number + 1, rows) % np.uint64(num_columns)) % np.uint64(num_columns)
    return rows * np.uint64(num_columns) + columns

"""Stateless 64-bit hashes over numpy arrays: they shuffle the data and prove what was read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def mix64(values: UInt64Array) -> UInt64Array:
    """Mix each 64-bit value: the finaliser of SplitMix64, a bijection (Steele et al. 2014, fig. 16).

    Args:
        values: Array of at least one dimension (numpy warns of overflow on scalars, which is meant here).
    """
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER_2
    return values ^ (values >> np.uint64(31))


def hash64(*parts: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Hash a tuple of integers, element by element; parts broadcast against each other.

    Returns:
        An array of at least one dimension.
    """
    state: UInt64Array = np.zeros(1, np.uint64)
    for part in parts:
        values: UInt64Array = np.array([part & _MASK], np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        state = mix64((state ^ values) + _GOLDEN)
    return state


def hash_samples(sample_ids_N2: npt.NDArray[np.int64], tokens_NT: npt.NDArray[np.int64]) -> UInt64Array:
    """Hash each sample's identity together with the tokens that were read for it.

    Args:
        sample_ids_N2: Set number and position in the stream of each sample.
        tokens_NT: The tokens read for it.

    Returns:
        One 64-bit hash a sample; their sum modulo 2**64 does not depend on the order of the samples.
    """
    coefficients_T = mix64(np.arange(1, tokens_NT.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    content_N = tokens_NT.view(np.uint64) @ coefficients_T
    return hash64(sample_ids_N2[:, 0], sample_ids_N2[:, 1], content_N)


def sum_hashes(hashes: UInt64Array) -> int:
    """Sum modulo 2**64, as the signed 64-bit integer that an int64 all-reduce sums on with the same wrap-around."""
    return int(hashes.sum(dtype=np.uint64).astype(np.int64))


def format_sample_hash(sample_hash: int) -> str:
    """Write a sum of sample hashes as 16 hexadecimal digits.

    Args:
        sample_hash: The sum, signed or not; only its value modulo 2**64 counts.
    """
    return f"{sample_hash & _MASK:016x}"

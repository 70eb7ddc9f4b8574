from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalibi.data.hashing import format_sample_hash, hash64, hash_samples, mix64, sum_hashes

MASK = 2**64 - 1


def splitmix64_ref(state: int) -> int:
    """The published SplitMix64, on Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


@given(st.integers(0, MASK))
def test_mix64_is_splitmix64(value):
    assert mix64(np.array([value], np.uint64))[0] == splitmix64_ref(value)


def test_published_splitmix64_stream():
    """First outputs for seed 1234567, as listed by Rosetta Code and the reference implementation."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * golden) & MASK for step in (1, 2, 3)], np.uint64)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hash64_tells_order_and_sign():
    hashes = {int(hash64(*parts)[0]) for parts in [(1, 2), (2, 1), (-1, 2), (1,), (1, 2, 0), (1, 0, 2)]}
    assert len(hashes) == 6


def test_hash64_broadcasts():
    assert hash64(3, np.arange(4)).tolist() == [int(hash64(3, index)[0]) for index in range(4)]


def test_a_sample_hash_tells_set_place_and_every_token():
    ids, tokens = np.array([[1, 5]]), np.array([[10, 11, 12]])
    variants = [
        (ids, tokens),
        (np.array([[0, 5]]), tokens),
        (np.array([[1, 6]]), tokens),
        (ids, np.array([[11, 10, 12]])),
        (ids, np.array([[10, 11, 13]])),
    ]
    assert len({int(hash_samples(*variant)[0]) for variant in variants}) == len(variants)


@given(st.lists(st.integers(0, MASK), max_size=9))
def test_sums_wrap_around_like_an_int64_sum(hashes):
    total = sum_hashes(np.array(hashes, np.uint64))
    assert -(2**63) <= total < 2**63
    assert total % 2**64 == sum(hashes) % 2**64
    assert format_sample_hash(total) == f"{sum(hashes) % 2**64:016x}"

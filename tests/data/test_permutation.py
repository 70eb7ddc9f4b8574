from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalibi.data.hashing import hash64
from megalibi.data.permutation import permute

CHI_SQUARE_99_DOF_ONE_IN_A_MILLION = 178.0


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_bijective(size, seed):
    assert sorted(permute(np.arange(size), size, hash64(seed)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**12 + 39, 2**61 - 1])
def test_huge_sets_cost_no_memory_and_stay_in_range(size):
    indices = np.concatenate([np.arange(2000), size - 1 - np.arange(2000)])
    images = permute(indices, size, hash64(1))
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(indices)


def test_one_key_an_index():
    keys = hash64(3, np.array([0, 0, 1, 1]))
    images = permute(np.array([4, 5, 4, 5]), 1000, keys)
    assert images[:2].tolist() == permute(np.array([4, 5]), 1000, hash64(3, 0)).tolist()
    assert images[2:].tolist() == permute(np.array([4, 5]), 1000, hash64(3, 1)).tolist()


def test_looks_random():
    """Over 20,000 keys, where index 3 of 100 goes is uniform, and neighbours are not kept together."""
    keys = hash64(np.arange(20_000))
    first = permute(np.full(20_000, 3), 100, keys)
    second = permute(np.full(20_000, 4), 100, keys)
    counts = np.bincount(first, minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < CHI_SQUARE_99_DOF_ONE_IN_A_MILLION
    steps = np.bincount((second - first) % 100, minlength=100)
    assert steps[0] == 0
    assert ((steps[1:] - 20_000 / 99) ** 2 / (20_000 / 99)).sum() < CHI_SQUARE_99_DOF_ONE_IN_A_MILLION


def test_the_order_is_a_promise():
    """A change of these numbers changes the data order of every run that resumes."""
    assert permute(np.arange(12), 12, hash64(1234, 0, 0)).tolist() == [5, 4, 3, 9, 7, 10, 8, 1, 11, 6, 2, 0]

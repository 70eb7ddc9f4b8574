from __future__ import annotations

import dataclasses

import pytest

from megalibi.parallel import ALONE, WHOLE, Layout
from tests.support.tensors import fake_group


def test_a_group_of_one_has_no_sequence_to_cut() -> None:
    assert Layout(ALONE, sequence_parallel=True) == WHOLE
    assert not WHOLE.sequence_parallel
    assert Layout(fake_group(1, 2), sequence_parallel=True).sequence_parallel
    assert not Layout(fake_group(1, 2)).sequence_parallel


def test_a_layout_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        WHOLE.sequence_parallel = True  # type: ignore[misc]

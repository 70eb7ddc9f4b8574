from __future__ import annotations

import math

import pytest
import torch

from megalibi.model.positions import Sinusoidal, sinusoidal_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("hidden_size", [2, 4, 16, 48])
def test_table_equals_the_formula(hidden_size: int) -> None:
    half = hidden_size // 2
    table = sinusoidal_table(300, hidden_size, CPU)
    assert table.dtype == torch.float32
    for position in (0, 1, 7, 299):
        for i in range(half):
            angle = position * 10_000 ** (-i / max(1, half - 1))
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert table[position, half + i].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_table_of_a_longer_sequence_begins_with_that_of_a_shorter() -> None:
    assert torch.equal(sinusoidal_table(1000, 32, CPU)[:10], sinusoidal_table(10, 32, CPU))


def test_every_row_gets_the_table_in_its_own_dtype() -> None:
    x = torch.randn(2, 5, 8).bfloat16()
    y = Sinusoidal().add_to_embedding(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x + sinusoidal_table(5, 8, CPU).bfloat16())
    assert not Sinusoidal().state_dict()

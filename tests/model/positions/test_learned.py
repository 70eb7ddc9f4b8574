from __future__ import annotations

import pytest
import torch

from megalibi.errors import ConfigError
from megalibi.model.positions.learned import Learned
from megalibi.parallel import ALONE
from tests.support.models import build_gpt, make_model, random_tokens


def make(rows: int):
    return make_model(position_method="learned", max_position_embeddings=rows)


def test_every_position_gets_its_row_in_the_dtype_of_the_embedding() -> None:
    positions = Learned(make(6), ALONE)
    torch.nn.init.normal_(positions.table.weight)
    x = torch.randn(2, 5, 48).bfloat16()
    y = positions.add_to_embedding(x)
    assert torch.equal(y, x + positions.table.weight[:5].bfloat16())


def test_the_length_cap_is_a_clear_error() -> None:
    gpt = build_gpt(make(12))
    assert torch.isfinite(gpt(*random_tokens(1, 12))).all()
    with pytest.raises(
        ConfigError, match=r"^model.max_position_embeddings=12: must be at least 13, the length of the sequence"
    ):
        gpt(*random_tokens(1, 13))

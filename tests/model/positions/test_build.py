from __future__ import annotations

import pytest
import torch

from megalibi.config.model import POSITION_METHODS
from megalibi.model import check_backend
from megalibi.model.positions import METHODS, ScoreBias, build_position_method
from megalibi.parallel import ALONE
from tests.support.models import make_model

CPU = torch.device("cpu")


def make(method: str, **fields):
    cap = {"max_position_embeddings": 64} if method == "learned" else {}
    return make_model(position_method=method, **cap, **fields)


def test_the_schema_and_the_model_know_the_same_methods() -> None:
    assert tuple(METHODS) == POSITION_METHODS


@pytest.mark.parametrize("method", POSITION_METHODS)
def test_every_method_says_which_bias_it_gives_and_can_be_computed(method: str) -> None:
    model = make(method)
    positions = build_position_method(model, ALONE)
    for parameter in positions.parameters():
        torch.nn.init.normal_(parameter)
    bias = positions.score_bias(9, CPU)
    given = {"alibi": bias.alibi_slopes is not None, "distance": bias.distance_bias is not None}
    assert [kind for kind, is_given in given.items() if is_given] == [b for b in [positions.bias] if b != "no"]
    for dtype in (torch.float32, torch.bfloat16):
        check_backend(model, CPU, dtype)


def test_none_acts_nowhere() -> None:
    positions = build_position_method(make("none"), ALONE)
    x = torch.randn(2, 3, 4)
    assert positions.add_to_embedding(x) is x
    assert positions.apply_to_query_key(x, x) == (x, x)
    assert positions.score_bias(3, CPU) == ScoreBias()

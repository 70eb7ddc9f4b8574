from __future__ import annotations

import pytest
import torch

from alibi_attention import alibi_slopes
from megalibi.model import model_slopes
from megalibi.model.positions import PositionMethod
from megalibi.model.positions.alibi import Alibi
from megalibi.parallel import ALONE
from tests.support.models import build_gpt, make_model
from tests.support.tensors import fake_group

CPU = torch.device("cpu")


def slopes_of(positions: PositionMethod) -> torch.Tensor:
    slopes = positions.score_bias(8, CPU).alibi_slopes
    assert slopes is not None
    return slopes


@pytest.mark.parametrize("heads", [4, 12, 20, 24])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_trap_2_each_rank_has_the_slopes_of_its_own_heads(heads: int, size: int) -> None:
    by_rank = [
        slopes_of(Alibi(make_model(num_attention_heads=heads, hidden_size=heads * 4), fake_group(rank, size)))
        for rank in range(size)
    ]
    assert all(len(slopes) == heads // size for slopes in by_rank)
    assert torch.equal(torch.cat(by_rank), alibi_slopes(heads))


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_scaled_slopes_are_divided_by_the_root_of_the_head_dimension_and_keyed_by_head(heads: int, size: int) -> None:
    plain = make_model(num_attention_heads=heads, hidden_size=heads * 20)
    model = make_model(num_attention_heads=heads, hidden_size=heads * 20, scale_alibi=True)
    assert torch.equal(model_slopes(plain), alibi_slopes(heads))
    slopes = torch.cat([slopes_of(Alibi(model, fake_group(rank, size))) for rank in range(size)])
    assert slopes.dtype == torch.float32
    assert torch.equal(slopes, model_slopes(model))
    torch.testing.assert_close(slopes.double(), alibi_slopes(heads).double() / 20**0.5, rtol=2**-24, atol=0)


@pytest.mark.parametrize("scale_alibi", [False, True])
def test_slopes_scaled_at_evaluation_are_rounded_once_and_no_scale_adds_to_another(scale_alibi: bool) -> None:
    model = make_model(num_attention_heads=12, hidden_size=240, scale_alibi=scale_alibi)
    by_rank = [Alibi(model, fake_group(rank, 2)) for rank in range(2)]
    exact = alibi_slopes(12).double() / (20**0.5 if scale_alibi else 1.0)
    for factor in (33 / 64, 3.0, 1e-6, 1e6):
        for positions in by_rank:
            positions.scale_slopes(factor)
        slopes = torch.cat([slopes_of(positions) for positions in by_rank])
        assert torch.equal(slopes, (exact * factor).float())
        assert slopes.isfinite().all()
        assert slopes.min() > torch.finfo(torch.float32).tiny
    for positions in by_rank:
        positions.scale_slopes(1.0)
    assert torch.equal(torch.cat([slopes_of(positions) for positions in by_rank]), model_slopes(model))


@pytest.mark.parametrize("called_before", [False, True])
def test_trap_2_slopes_are_no_state_and_are_never_cast(called_before: bool) -> None:
    gpt = build_gpt(make_model(num_attention_heads=12))
    if called_before:
        slopes_of(gpt.positions)
    for cast in (gpt.bfloat16, gpt.half, gpt.double, gpt.float):
        cast()
        slopes = slopes_of(gpt.positions)
        assert slopes.dtype == torch.float32
        assert torch.equal(slopes, alibi_slopes(12))
    assert not [name for name in gpt.state_dict() if "position" in name or "slope" in name]
    assert not list(gpt.buffers())


def test_alibi_leaves_embedding_and_queries_alone() -> None:
    x = torch.randn(2, 3, 4)
    positions = Alibi(make_model(), ALONE)
    assert positions.add_to_embedding(x) is x
    assert positions.apply_to_query_key(x, x) == (x, x)

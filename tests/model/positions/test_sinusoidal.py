from __future__ import annotations

import math

import pytest
import torch

from megalibi.model.positions.sinusoidal import Sinusoidal, sinusoidal_table
from megalibi.parallel import ALONE
from tests.support.models import build_gpt, make_model

FP32_ROUNDING = 1e-7


@pytest.mark.parametrize("hidden_size", [2, 4, 16, 48])
def test_table_equals_the_formula(hidden_size: int) -> None:
    half = hidden_size // 2
    table = sinusoidal_table(torch.arange(16_384), hidden_size)
    assert table.dtype == torch.float32
    for position in (0, 1, 7, 299, 16_383):
        for i in range(half):
            angle = position * 10_000 ** (-i / max(1, half - 1))
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=FP32_ROUNDING)
            assert table[position, half + i].item() == pytest.approx(math.cos(angle), abs=FP32_ROUNDING)


def test_table_of_a_longer_sequence_begins_with_that_of_a_shorter() -> None:
    assert torch.equal(sinusoidal_table(torch.arange(1000), 32)[:10], sinusoidal_table(torch.arange(10), 32))


def test_every_row_gets_the_table_in_its_own_dtype_at_the_scale_of_the_tokens() -> None:
    x = torch.randn(2, 5, 8).bfloat16()
    positions = Sinusoidal(make_model(init_std=0.25), ALONE)
    y = positions.add_to_embedding(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x + (0.25 * sinusoidal_table(torch.arange(5), 8)).bfloat16())


@pytest.mark.parametrize(("scale_embedding", "tokens"), [(False, 1.0), (True, 4.0)])
@pytest.mark.parametrize("amplitude", [0.0, 0.125])
def test_the_table_has_the_amplitude_that_it_is_given(scale_embedding: bool, tokens: float, amplitude: float) -> None:
    x = torch.randn(2, 5, 16)
    fields = {"scale_embedding": scale_embedding, "sinusoidal_amplitude": amplitude}
    model = make_model(position_method="sinusoidal", hidden_size=16, init_std=0.25, **fields)
    y = Sinusoidal(model, ALONE).add_to_embedding(x)
    torch.testing.assert_close(y, tokens * x + amplitude * sinusoidal_table(torch.arange(5), 16), rtol=1e-6, atol=1e-6)


def test_scaled_tokens_stand_beside_a_table_of_amplitude_1() -> None:
    x = torch.randn(2, 5, 16)
    model = make_model(position_method="sinusoidal", hidden_size=16, init_std=0.25, scale_embedding=True)
    y = Sinusoidal(model, ALONE).add_to_embedding(x, first=(3,))
    torch.testing.assert_close(y, 4 * x + sinusoidal_table(torch.arange(3, 8), 16), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale_embedding", [False, True])
def test_at_the_start_the_table_has_half_the_variance_of_the_tokens(scale_embedding: bool) -> None:
    gpt = build_gpt(make_model(position_method="sinusoidal", init_std=0.02, scale_embedding=scale_embedding))
    x = gpt.embedding(torch.arange(300)[None])
    table = gpt.positions.add_to_embedding(torch.zeros_like(x))
    both = gpt.positions.add_to_embedding(x)
    ratio = table.square().mean() / (both - table).square().mean()
    assert ratio.item() == pytest.approx(0.5, rel=0.05)  # sin^2 + cos^2 = 1
    if scale_embedding:
        assert (both - table).std().item() == pytest.approx(1.0, rel=0.05)
    assert not gpt.positions.state_dict()

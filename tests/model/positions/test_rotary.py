from __future__ import annotations

import cmath

import pytest
import torch

from megalibi.model.positions.rotary import Rotary, rotary_table
from megalibi.parallel import ALONE
from tests.support.models import make_model

FP32_ROUNDING = 1e-7


def turn(x: torch.Tensor) -> torch.Tensor:
    """[B, S, A, K] as queries; keys are treated alike."""
    q, k = Rotary(make_model(), ALONE).apply_to_query_key(x, x)
    assert torch.equal(q, k)
    return q


@pytest.mark.parametrize("position", [0, 1, 7, 16_383])
def test_table_equals_the_formula_far_out(position: int) -> None:
    cos, sin = rotary_table(torch.arange(16_384), 8)
    for i in range(4):
        expected = cmath.exp(1j * position * 10_000 ** (-2 * i / 8))
        assert complex(cos[position, 0, i], sin[position, 0, i]) == pytest.approx(expected, abs=FP32_ROUNDING)


def test_pairs_are_turned_as_complex_numbers() -> None:
    x = torch.randn(2, 5, 3, 8)
    turned = torch.complex(*turn(x).chunk(2, dim=-1))
    pairs = torch.complex(*x.chunk(2, dim=-1))
    angles = torch.arange(5)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(turned, pairs * torch.polar(torch.ones(()), angles)[:, None, :])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(8), torch.randn(8)
    row = torch.stack([q, k]).repeat_interleave(40, 0).view(1, 80, 1, 8)
    turned = turn(row)[0, :, 0]
    scores = turned[:40] @ turned[40:].T  # [i, j]: query at i, key at 40 + j
    for distance in (-30, 0, 17):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_16_bits_are_turned_in_fp32() -> None:
    x = torch.randn(1, 300, 2, 8).bfloat16()
    assert torch.equal(turn(x), turn(x.float()).bfloat16())


def test_the_table_follows_the_length_and_is_no_state() -> None:
    positions = Rotary(make_model(), ALONE)
    long = torch.randn(1, 9, 2, 8)
    whole, _ = positions.apply_to_query_key(long, long)
    part, _ = positions.apply_to_query_key(long[:, :4], long[:, :4])
    assert torch.equal(whole[:, :4], part)
    assert not positions.state_dict()

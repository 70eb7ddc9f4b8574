from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_attention.backends.folded import cpu as folded_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def plan(horizon, slope, queries, keys, query_offset, dtype=torch.float32):
    return folded_cpu.plan_head(horizon, slope, queries, keys, query_offset, dtype)


def test_a_pytorch_that_cannot_do_it_is_found_out(monkeypatch):
    def without_mask(q, k, v, dropout_p, is_causal, *, attn_mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), None

    monkeypatch.setattr(folded_cpu, "_forward", without_mask)
    assert folded_cpu.find_missing().endswith("takes a mask in causal mode for something else")
    # The operator for a GPU, which takes no mask at all.
    monkeypatch.setattr(folded_cpu, "_forward", torch.ops.aten._scaled_dot_product_flash_attention)
    assert "takes no mask in causal mode: " in folded_cpu.find_missing()
    monkeypatch.setattr(folded_cpu, "_forward", None)
    assert folded_cpu.find_missing() == "this PyTorch has no flash attention for a CPU"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 3000),
    keys=st.integers(1, 3000),
    query_offset=st.sampled_from([0, 0, 1, 700]),
    horizon=st.integers(0, 3000) | st.sampled_from([64, 128, 320, 640]),
    slope=st.sampled_from([0.0, 2.0**-8, 0.5, -0.5]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_query_is_in_one_call_that_shows_it_all_it_needs(queries, keys, query_offset, horizon, slope, dtype):
    nearest = query_offset + queries - keys  # a horizon reaches the nearest key, else it is none
    horizon = min(max(horizon, nearest), query_offset + queries - 1)
    position = query_offset
    for part in plan(horizon, slope, queries, keys, query_offset, dtype):
        for block in range(part.blocks):
            first_key = part.first_key + block * part.queries
            assert part.first_query + block * part.queries == position - query_offset
            assert 0 <= first_key <= max(0, position - horizon)
            position += part.queries
            assert first_key + part.keys == min(position, keys)
        assert not part.causal or part.first_query == part.first_key == query_offset == 0
        assert not part.causal or abs(slope) * part.keys <= 128
        assert part.blocks == 1 or part.keys % part.queries == 0
    assert position == query_offset + queries


def test_work_follows_the_horizon():
    """What is computed for each query of 16,384 tokens: little more than the horizon, and never more than all."""
    for horizon in (70, 140, 280, 560, 1100, 2300, 4600):
        pairs = sum(part.blocks * part.queries * part.keys for part in plan(horizon, 35 / horizon, 16384, 16384, 0))
        assert pairs < 16384 * (1.35 * horizon + 100)
    (whole,) = plan(14000, 35 / 14000, 16384, 16384, 0)
    assert whole.causal


def test_a_bias_by_column_is_a_small_number():
    """m * 250 is 125 at slope 1/2, and half of that counted from the middle."""
    (part,) = plan(250, 0.5, 250, 250, 0)
    bias = folded_cpu._bias(part, torch.tensor([0.5]), 0)
    assert bias.shape == (1, 1, 1, 250)
    assert torch.equal(bias.diff(), torch.full((1, 1, 1, 249), 0.5))
    assert bias.abs().max() < 64


def test_heads_of_one_plan_share_a_call():
    local, whole = plan(70, 0.5, 4096, 4096, 0), plan(4095, 2.0**-8, 4096, 4096, 0)
    groups = folded_cpu.group_heads([whole, whole, local, local, whole])
    assert groups == [
        (slice(0, 2), whole),
        (slice(2, 3), local),
        (slice(3, 4), local),
        (slice(4, 5), whole),
    ]

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from alibi_attention import alibi_slopes, attention
from alibi_attention.backend import AttentionInputs
from alibi_attention.backends.sdpa import MIN_BLOCK_QUERIES, attend, reversed_bias

FP64_ATOL = 1e-12


def test_reversed_bias_is_the_bias_on_a_single_vector():
    slopes = alibi_slopes(12)
    bias = reversed_bias(slopes, 5, 9, last_position=8)
    distance = torch.arange(4, 9)[:, None] - torch.arange(9)
    expected = torch.where(distance >= 0, -slopes[:, None, None] * distance, -torch.inf)
    assert torch.equal(bias.flip(1), expected)
    assert bias.untyped_storage().nbytes() == 12 * (5 + 9 - 1) * 4


@pytest.mark.parametrize("length", [255, 256, 257, 511, 513, 1024, 1027])
def test_where_blocks_of_queries_meet(make_inputs, length):
    q, k, v, _ = make_inputs(1, length, 2, 8, dtype=torch.float64)
    results = [attention(q, k, v, alibi_slopes=alibi_slopes(2), backend=name) for name in ("sdpa", "reference")]
    torch.testing.assert_close(*results, rtol=0, atol=FP64_ATOL)


def test_the_backward_pass_does_not_keep_16_bit_inputs_beside_their_fp32_copies():
    """On a GPU; the meta device takes the same way, without numbers."""
    leaves = [torch.empty(1, 2 * MIN_BLOCK_QUERIES, 2, 8, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    qkv = [leaf.requires_grad_() * 1 for leaf in leaves]
    slopes = alibi_slopes(2).to("meta")
    inputs = AttentionInputs(*qkv, slopes, None, 0.5, None, dropout_p=0.1, query_offset=0, horizon_eps=0.0)
    output = attend(inputs)
    storages = [StorageWeakRef(x.untyped_storage()) for x in qkv]
    assert not any(storage.expired() for storage in storages)
    del inputs, qkv
    assert all(storage.expired() for storage in storages)
    gradients = torch.autograd.grad(output, leaves, torch.empty_like(output))
    assert {x.dtype for x in gradients} == {torch.bfloat16}

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from alibi_attention import alibi_slopes, attention

FP64_ATOL = 1e-13

attend_ref = partial(attention, backend="reference")


def attend_token_by_token(q, k, v, slopes, softmax_scale, documents, query_offset):
    """One query, one head, one key at a time; ``documents`` gives the document of every token of a row."""
    output = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            position = i + query_offset
            past = [j for j in range(min(position + 1, k.shape[1])) if documents[b][j] == documents[b][position]]
            for h in range(q.shape[2]):
                scores = [
                    softmax_scale * float(q[b, i, h] @ k[b, j, h]) - float(slopes[h]) * (position - j) for j in past
                ]
                total = sum(math.exp(score) for score in scores)
                for j, score in zip(past, scores, strict=True):
                    output[b, i, h] += math.exp(score) / total * v[b, j, h]
    return output


@pytest.mark.parametrize(("queries", "keys", "query_offset"), [(7, 7, None), (3, 7, None), (3, 7, 1), (1, 5, None)])
def test_equation_against_a_token_by_token_loop(make_inputs, queries, keys, query_offset):
    q, k, v, _ = make_inputs(2, queries, 3, 4, keys=keys, dtype=torch.float64)
    slopes = alibi_slopes(3)
    offset = keys - queries if query_offset is None else query_offset
    expected = attend_token_by_token(q, k, v, slopes, 0.3, [[0] * keys] * 2, offset)
    output = attend_ref(q, k, v, alibi_slopes=slopes, softmax_scale=0.3, query_offset=query_offset)
    torch.testing.assert_close(output, expected, rtol=0, atol=FP64_ATOL)


def test_documents_against_a_token_by_token_loop(make_inputs):
    q, k, v, _ = make_inputs(2, 6, 3, 4, dtype=torch.float64)
    slopes = alibi_slopes(3)
    # Row 0 holds documents of 1 and 5 tokens, row 1 one of 2 and one of 4; two are empty.
    cu_seqlens = torch.tensor([0, 0, 1, 6, 6, 8, 12], dtype=torch.int32)
    expected = attend_token_by_token(q, k, v, slopes, 0.5, [[0, 1, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3]], 0)
    output = attend_ref(q, k, v, alibi_slopes=slopes, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(output, expected, rtol=0, atol=FP64_ATOL)


def test_gradients_are_those_of_the_equation(make_inputs):
    *qkv, _ = make_inputs(2, 5, 3, 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 5, 10], dtype=torch.int32)
    for x in qkv:
        x.requires_grad_()
    assert torch.autograd.gradcheck(partial(attend_ref, alibi_slopes=alibi_slopes(3)), qkv)
    assert torch.autograd.gradcheck(partial(attend_ref, alibi_slopes=alibi_slopes(3), cu_seqlens=cu_seqlens), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_fp32(make_inputs, dtype):
    q, k, v, _ = make_inputs(1, 97, 12, 16, dtype=dtype)
    output = attend_ref(q, k, v, alibi_slopes=alibi_slopes(12))
    in_fp32 = attend_ref(q.float(), k.float(), v.float(), alibi_slopes=alibi_slopes(12))
    assert torch.equal(output, in_fp32.to(dtype))

from __future__ import annotations

import pytest
import torch

from alibi_attention.documents import attend_per_document, get_lengths


def test_get_lengths_counts_empty_documents():
    assert get_lengths(torch.tensor([0, 0, 1, 6, 6], dtype=torch.int32), 6) == [0, 1, 5, 0]


@pytest.mark.parametrize("boundaries", [[1, 6], [0, 5], [0, 7], [0, 4, 3, 6]])
def test_boundaries_that_do_not_rise_from_0_to_the_end_are_refused(boundaries):
    with pytest.raises(ValueError, match="must rise from 0 to the batch's 6 tokens, got"):
        get_lengths(torch.tensor(boundaries, dtype=torch.int32), 6)


def test_many_bad_boundaries_are_named_in_one_short_line():
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, \.\.\., 99\]$"):
        get_lengths(torch.arange(100, dtype=torch.int32), 98)


def test_documents_of_one_length_share_a_call_and_keep_their_order():
    lengths = [2, 3, 0, 2, 1, 2]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    tokens = torch.arange(10.0).reshape(2, 5, 1, 1)
    calls = []

    def negate(q, k, v):
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        calls.append(tuple(q.shape[:2]))
        return -q

    assert torch.equal(attend_per_document(negate, tokens, tokens, tokens, cu_seqlens), -tokens)
    assert calls == [(3, 2), (1, 3), (1, 1)]

from __future__ import annotations

import pytest
import torch

from alibi_attention.documents import PackedDocuments, attend_per_document
from tests.support.device import DEVICE


def test_empty_documents_have_a_length_too():
    documents = PackedDocuments(torch.tensor([0, 0, 1, 6, 6], dtype=torch.int32), 6)
    assert (documents.lengths, documents.max_length) == ((0, 1, 5, 0), 5)


@pytest.mark.parametrize("boundaries", [[1, 6], [0, 5], [0, 7], [0, 4, 3, 6]])
def test_boundaries_that_do_not_rise_from_0_to_the_end_are_refused(boundaries):
    with pytest.raises(ValueError, match="must rise from 0 to the batch's 6 tokens, got"):
        PackedDocuments(torch.tensor(boundaries, dtype=torch.int32), 6)


def test_many_bad_boundaries_are_named_in_one_short_line():
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, \.\.\., 99\]$"):
        PackedDocuments(torch.arange(100, dtype=torch.int32), 98)


def test_blocks_with_the_most_causal_work_come_first_and_are_made_once():
    documents = PackedDocuments(torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32), 9)
    blocks = documents.blocks(2)
    # Documents of 2, 0, 3 and 1 blocks: the document, the block's number in it, the document's first block.
    expected = [(2, 2, 2), (0, 1, 0), (2, 1, 2), (0, 0, 0), (2, 0, 2), (3, 0, 5)]
    assert list(map(tuple, blocks.T.tolist())) == expected
    assert blocks.dtype == torch.int32
    assert documents.blocks(2) is blocks
    assert documents.blocks(4).shape == (3, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("given", ["cpu", DEVICE])
def test_boundaries_go_to_the_device_from_anywhere(given):
    documents = PackedDocuments(torch.tensor([0, 2, 5], dtype=torch.int32, device=given), 5, torch.device(DEVICE))
    assert documents.lengths == (2, 3)
    for on_device in (documents.cu_seqlens, documents.blocks(2)):
        assert on_device.device.type == DEVICE
    assert documents.cu_seqlens.tolist() == [0, 2, 5]
    assert documents.blocks(2).tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 1]]


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

    assert torch.equal(attend_per_document(negate, tokens, tokens, tokens, PackedDocuments(cu_seqlens, 10)), -tokens)
    assert calls == [(3, 2), (1, 3), (1, 1)]

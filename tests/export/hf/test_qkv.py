from __future__ import annotations

import torch

from megalibi.export.hf.qkv import interleave_heads, separate_heads


def test_the_three_of_a_head_stand_together_and_come_apart_again() -> None:
    heads, width = 3, 2
    ours = torch.arange(3 * heads * width * 5).view(3 * heads * width, 5)
    q, k, v = ours.chunk(3)
    theirs = interleave_heads(ours, heads)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        of_head = theirs[3 * head * width : 3 * (head + 1) * width]
        assert torch.equal(of_head, torch.cat([q[rows], k[rows], v[rows]]))
    assert torch.equal(separate_heads(theirs, heads), ours)
    assert torch.equal(separate_heads(interleave_heads(ours[:, 0], heads), heads), ours[:, 0])

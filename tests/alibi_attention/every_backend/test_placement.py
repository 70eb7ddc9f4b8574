"""Documents, and queries that stand elsewhere than the keys."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alibi_attention import attention
from tests.alibi_attention.every_backend.support import (
    BOUNDS,
    HEAD_DIM,
    best_dtype,
    every_backend,
    every_backend_and_dtype,
    pick,
    slopes_of,
    with_and_without_slopes,
)
from tests.support.device import DEVICE

gpu = pytest.mark.gpu  # named in each file: by it a GPU's run finds them


@gpu
@with_and_without_slopes
@every_backend_and_dtype
def test_documents_with_empty_and_one_token_ones(make_inputs, check, backend, dtype, with_slopes):
    boundaries = pick(backend, [0, 0, 1, 2, 300, 300, 500, 800, 999, 1000], [0, 0, 1, 2, 35, 35, 50, 70, 99, 100])
    num_heads = pick(backend, 3, 2)
    inputs = make_inputs(2, boundaries[-1] // 2, num_heads, HEAD_DIM, dtype=dtype)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=DEVICE)
    check(backend, inputs, alibi_slopes=slopes_of(num_heads) if with_slopes else None, cu_seqlens=cu_seqlens)


@gpu
@with_and_without_slopes
@every_backend
def test_fewer_queries_than_keys_and_an_explicit_offset(make_inputs, check, backend, with_slopes):
    length, num_heads, dtype = *pick(backend, (700, 12), (90, 2)), best_dtype(backend)
    slopes = slopes_of(num_heads) if with_slopes else None
    q, k, v, upstream = make_inputs(1, length, num_heads, HEAD_DIM, dtype=dtype)
    for start, end in ((0, 1), (length // 7, length - length // 7), (length - 1, length)):
        rows = slice(start, end)
        check(backend, (q[:, rows], k, v, upstream[:, rows]), alibi_slopes=slopes, query_offset=start)
    last = slice(length // 2, None)
    check(backend, (q[:, last], k, v, upstream[:, last]), alibi_slopes=slopes)


@gpu
@every_backend
def test_trap_5_a_chunk_of_queries_has_its_true_distances_and_its_slopes(make_inputs, relative_errors, backend):
    """FlashAttention-3 documents slopes and does not take them; a bias by column alone needs the offset."""
    q, k, v, _ = make_inputs(1, 40, 4, HEAD_DIM, dtype=best_dtype(backend))
    attend = partial(attention, backend=backend.name)
    whole = attend(q, k, v, alibi_slopes=slopes_of(4)).double()
    (moved,) = relative_errors([attend(q, k, v, alibi_slopes=None)], [whole])
    assert moved > 0.1
    chunk = attend(q[:, 10:30], k, v, alibi_slopes=slopes_of(4), query_offset=10)
    (moved,) = relative_errors([chunk], [whole[:, 10:30]])
    assert moved < BOUNDS[q.dtype]


@gpu
@every_backend
def test_queries_past_the_last_key(make_inputs, check, backend):
    queries, keys, offset = pick(backend, (600, 400, 350), (60, 40, 35))
    inputs = make_inputs(1, queries, 3, HEAD_DIM, keys=keys, dtype=best_dtype(backend))
    arguments = {"alibi_slopes": slopes_of(3), "query_offset": offset}
    if backend.gap:
        check(backend, inputs, **arguments)
    else:
        with pytest.raises(RuntimeError, match="it cannot place queries beyond the last key"):
            attention(*inputs[:3], backend=backend.name, **arguments)

"""The Triton kernels of the backward pass: one for dq over blocks of queries, one for dk and dv over blocks of keys.

Each gradient is summed by one program in one order: no atomic additions, the same bits every time. The scores are
computed twice for it. Both kernels visit exactly the pairs of blocks that the forward pass visited, by its first keys.

Shape suffixes: M queries of a tile, N keys of a tile, K head dimension padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alibi_attention.backends.triton.common import (
    LENGTHS,
    LOG2E,
    dot,
    find_base,
    find_extent,
    find_slope,
    find_task,
    load_tile,
    round_to,
    see_keys,
    store_tile,
)
from alibi_attention.backends.triton.tiles import KEY_GRADIENT, QUERY_GRADIENT


@triton.jit
def _add_query_gradient(
    dq_MK: tl.tensor, q_MK: tl.tensor, do_MK: tl.tensor, lse_M: tl.tensor, delta_M: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, k_stride_s: int, v_stride_s: int,
    key: tl.tensor, keys: tl.tensor, position: tl.tensor, scale: tl.tensor, slope: tl.tensor,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add what the keys ``key`` to ``key + BLOCK_N - 1`` give to dq; some may be hidden if MASKED."""
    row_M = tl.arange(0, BLOCK_M)
    key_N = see_keys(key, keys, position, BLOCK_N, MASKED)
    k_NK = load_tile(k_ptr, key, keys, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, MASKED)
    v_NK = load_tile(v_ptr, key, keys, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, MASKED)
    product_MN = dot(q_MK, tl.trans(k_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if MASKED:
        distance_MN = row_M.to(tl.float32)[:, None] - key_N[None, :]
        score_MN = tl.where(distance_MN >= 0, product_MN * scale - slope * distance_MN, float("-inf"))
        weight_MN = tl.exp2(score_MN - lse_M[:, None])
    else:  # the bias as the forward pass has it
        score_MN = product_MN * scale + (slope * key_N)[None, :]
        weight_MN = tl.exp2(score_MN - (lse_M + slope * row_M)[:, None])
    dweight_MN = dot(do_MK, tl.trans(v_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    dscore_MN = weight_MN * (dweight_MN - delta_M[:, None])
    return dot(round_to(dscore_MN, k_NK.dtype), k_NK, dq_MK)


@QUERY_GRADIENT.tune
@triton.jit(do_not_specialize=LENGTHS)
def query_gradient_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, o_ptr: tl.tensor, do_ptr: tl.tensor, dq_ptr: tl.tensor,
    lse_ptr: tl.tensor, delta_ptr: tl.tensor, slopes_ptr: tl.tensor, first_keys_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor, tasks_ptr: tl.tensor, softmax_scale: float,
    q_stride_b: int, q_stride_s: int, q_stride_h: int, k_stride_b: int, k_stride_s: int, k_stride_h: int,
    v_stride_b: int, v_stride_s: int, v_stride_h: int, do_stride_b: int, do_stride_s: int, do_stride_h: int,
    o_stride_b: int, o_stride_s: int, o_stride_h: int, dq_stride_b: int, dq_stride_s: int, dq_stride_h: int,
    num_groups: int, num_heads: int, num_query_blocks: int, num_key_blocks: int, num_queries: int, num_keys: int,
    query_offset: int, length_bucket: int,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Store dq, and delta = o.do of each query for the kernel of dk and dv, which has to run later."""
    tiles: tl.constexpr = BLOCK // BLOCK_M
    row, head, group, block, tile, first_block = find_task(tasks_ptr, num_groups, num_heads, num_query_blocks, tiles)
    start, queries, keys, offset = find_extent(row, cu_seqlens_ptr, num_queries, num_keys, query_offset)
    query = block * BLOCK + tile * BLOCK_M
    if query >= queries:
        return
    position = offset + query
    scale = softmax_scale * LOG2E
    slope = find_slope(slopes_ptr, head)
    q_ptr = find_base(q_ptr, row, start, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr = find_base(k_ptr, row, start, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr = find_base(v_ptr, row, start, head, v_stride_b, v_stride_s, v_stride_h)
    o_ptr = find_base(o_ptr, row, start, head, o_stride_b, o_stride_s, o_stride_h)
    dq_ptr = find_base(dq_ptr, row, start, head, dq_stride_b, dq_stride_s, dq_stride_h)
    do_ptr = find_base(do_ptr, row, start, head, do_stride_b, do_stride_s, do_stride_h)
    q_MK = load_tile(q_ptr, query, queries, q_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, True)
    do_MK = load_tile(do_ptr, query, queries, do_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, True)
    o_MK = load_tile(o_ptr, query, queries, o_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, True)

    row_M = query + tl.arange(0, BLOCK_M)
    stored = tl.cast(group, tl.int64) * num_queries + start
    lse_M = tl.load(lse_ptr + stored + row_M, mask=row_M < queries, other=float("inf"))  # no weights past the end
    delta_M = tl.sum(o_MK.to(tl.float32) * do_MK.to(tl.float32), 1)
    tl.store(delta_ptr + stored + row_M, delta_M, mask=row_M < queries)

    first_key = 0
    if first_keys_ptr is not None:
        first_key = tl.load(first_keys_ptr + group * num_query_blocks + first_block + block)
    diagonal = tl.minimum(position, keys - 1) // BLOCK_N * BLOCK_N
    dq_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    # The diagonal first: in the other order ptxas waits for each matrix instruction on sm_90 (C7515).
    for key in range(diagonal, tl.minimum(position + tl.minimum(queries - query, BLOCK_M), keys), BLOCK_N):
        dq_MK = _add_query_gradient(
            dq_MK, q_MK, do_MK, lse_M, delta_M, k_ptr, v_ptr, k_stride_s, v_stride_s,
            key, keys, position, scale, slope, HEAD_DIM, BLOCK_K, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    for key in range(first_key, diagonal, BLOCK_N):
        dq_MK = _add_query_gradient(
            dq_MK, q_MK, do_MK, lse_M, delta_M, k_ptr, v_ptr, k_stride_s, v_stride_s,
            key, keys, position, scale, slope, HEAD_DIM, BLOCK_K, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    store_tile(dq_ptr, query, queries, dq_stride_s, dq_MK * softmax_scale, BLOCK_M, HEAD_DIM, BLOCK_K)


@triton.jit
def _find_visits(
    first_keys_ptr: tl.tensor, key: tl.tensor, first: tl.tensor, end: tl.tensor, SCAN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the end of the query blocks from ``first`` on that visit a key, and whether all before that end do."""
    last = first
    visits = 0
    for start in range(first, end, SCAN):
        block = start + tl.arange(0, SCAN)
        first_keys = tl.load(first_keys_ptr + block, mask=block < end, other=2**31 - 1)
        last = tl.maximum(last, tl.max(tl.where(first_keys <= key, block + 1, 0), 0))
        visits += tl.sum((first_keys <= key).to(tl.int32), 0)
    return last, visits == last - first


@triton.jit
def _add_key_gradients(
    dk_NK: tl.tensor, dv_NK: tl.tensor, k_NK: tl.tensor, v_NK: tl.tensor,
    q_ptr: tl.tensor, do_ptr: tl.tensor, q_stride_s: int, do_stride_s: int,
    lse_ptr: tl.tensor, delta_ptr: tl.tensor, first_keys_ptr: tl.tensor,
    query: tl.tensor, queries: tl.tensor, key: tl.tensor, offset: tl.tensor, scale: tl.tensor, slope: tl.tensor,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Add what the queries ``query`` to ``query + BLOCK_M - 1`` give to dk and dv.

    If MASKED, some may not see the keys, may be past the end, or may have left the keys out.
    """
    row_M = tl.arange(0, BLOCK_M)
    key_N = see_keys(key, key + BLOCK_N, offset + query, BLOCK_N, False)
    q_MK = load_tile(q_ptr, query, queries, q_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, MASKED)
    do_MK = load_tile(do_ptr, query, queries, do_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, MASKED)
    product_NM = dot(k_NK, tl.trans(q_MK), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    if MASKED:
        rows = queries - query
        if first_keys_ptr is not None:
            rows = tl.where(tl.load(first_keys_ptr + query // BLOCK) <= key, rows, 0)
        lse_M = tl.load(lse_ptr + query + row_M, mask=row_M < rows, other=float("inf"))  # no weight
        delta_M = tl.load(delta_ptr + query + row_M, mask=row_M < rows, other=0.0)
        distance_NM = row_M.to(tl.float32)[None, :] - key_N[:, None]
        score_NM = tl.where(distance_NM >= 0, product_NM * scale - slope * distance_NM, float("-inf"))
        weight_NM = tl.exp2(score_NM - lse_M[None, :])
    else:
        lse_M = tl.load(lse_ptr + query + row_M)
        delta_M = tl.load(delta_ptr + query + row_M)
        score_NM = product_NM * scale + (slope * key_N)[:, None]
        weight_NM = tl.exp2(score_NM - (lse_M + slope * row_M)[None, :])
    dv_NK = dot(round_to(weight_NM, do_MK.dtype), do_MK, dv_NK)
    dweight_NM = dot(v_NK, tl.trans(do_MK), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    dscore_NM = weight_NM * (dweight_NM - delta_M[None, :])
    dk_NK = dot(round_to(dscore_NM, q_MK.dtype), q_MK, dk_NK)
    return dk_NK, dv_NK


@KEY_GRADIENT.tune
@triton.jit(do_not_specialize=LENGTHS)
def key_gradient_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, do_ptr: tl.tensor, dk_ptr: tl.tensor, dv_ptr: tl.tensor,
    lse_ptr: tl.tensor, delta_ptr: tl.tensor, slopes_ptr: tl.tensor, first_keys_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor, tasks_ptr: tl.tensor, softmax_scale: float,
    q_stride_b: int, q_stride_s: int, q_stride_h: int, k_stride_b: int, k_stride_s: int, k_stride_h: int,
    v_stride_b: int, v_stride_s: int, v_stride_h: int, do_stride_b: int, do_stride_s: int, do_stride_h: int,
    dk_stride_b: int, dk_stride_s: int, dk_stride_h: int,
    num_groups: int, num_heads: int, num_query_blocks: int, num_key_blocks: int, num_queries: int, num_keys: int,
    query_offset: int, length_bucket: int,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Store dk and dv, which are laid out alike."""
    tiles: tl.constexpr = BLOCK // BLOCK_N
    row, head, group, block, tile, first_block = find_task(tasks_ptr, num_groups, num_heads, num_key_blocks, tiles)
    start, queries, keys, offset = find_extent(row, cu_seqlens_ptr, num_queries, num_keys, query_offset)
    # The first keys have the most queries: the order of the tasks is turned round.
    key = (tl.cdiv(keys, BLOCK) - 1 - block) * BLOCK + tile * BLOCK_N
    if key >= keys:
        return
    scale = softmax_scale * LOG2E
    slope = find_slope(slopes_ptr, head)
    q_ptr = find_base(q_ptr, row, start, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr = find_base(k_ptr, row, start, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr = find_base(v_ptr, row, start, head, v_stride_b, v_stride_s, v_stride_h)
    do_ptr = find_base(do_ptr, row, start, head, do_stride_b, do_stride_s, do_stride_h)
    dk_ptr = find_base(dk_ptr, row, start, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr = find_base(dv_ptr, row, start, head, dk_stride_b, dk_stride_s, dk_stride_h)
    stored = tl.cast(group, tl.int64) * num_queries + start
    lse_ptr += stored
    delta_ptr += stored
    k_NK = load_tile(k_ptr, key, keys, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, True)
    v_NK = load_tile(v_ptr, key, keys, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, True)

    # Queries before ``seen`` see none of the keys, those from ``all_seen`` on see all of them.
    seen = tl.maximum(key - offset, 0) // BLOCK_M * BLOCK_M
    all_seen = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    end = queries
    whole_end = queries // BLOCK_M * BLOCK_M
    if first_keys_ptr is not None:
        first_keys_ptr += group * num_query_blocks + first_block
        last_block, all_visit = _find_visits(first_keys_ptr, key, seen // BLOCK, tl.cdiv(queries, BLOCK), SCAN)
        end = tl.minimum(queries, last_block * BLOCK)
        # A block whose queries are short may leave out what a later one visits. The rest is then asked one by one.
        whole_end = tl.where(all_visit, end // BLOCK_M * BLOCK_M, 0)
    whole_end = tl.maximum(whole_end, all_seen)

    dk_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for query in range(seen, tl.minimum(all_seen, end), BLOCK_M):
        dk_NK, dv_NK = _add_key_gradients(
            dk_NK, dv_NK, k_NK, v_NK, q_ptr, do_ptr, q_stride_s, do_stride_s, lse_ptr, delta_ptr, first_keys_ptr,
            query, queries, key, offset, scale, slope, HEAD_DIM, BLOCK_K, BLOCK, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    for query in range(all_seen, whole_end, BLOCK_M):
        dk_NK, dv_NK = _add_key_gradients(
            dk_NK, dv_NK, k_NK, v_NK, q_ptr, do_ptr, q_stride_s, do_stride_s, lse_ptr, delta_ptr, first_keys_ptr,
            query, queries, key, offset, scale, slope, HEAD_DIM, BLOCK_K, BLOCK, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    for query in range(whole_end, end, BLOCK_M):
        dk_NK, dv_NK = _add_key_gradients(
            dk_NK, dv_NK, k_NK, v_NK, q_ptr, do_ptr, q_stride_s, do_stride_s, lse_ptr, delta_ptr, first_keys_ptr,
            query, queries, key, offset, scale, slope, HEAD_DIM, BLOCK_K, BLOCK, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    store_tile(dk_ptr, key, keys, dk_stride_s, dk_NK * softmax_scale, BLOCK_N, HEAD_DIM, BLOCK_K)
    store_tile(dv_ptr, key, keys, dk_stride_s, dv_NK, BLOCK_N, HEAD_DIM, BLOCK_K)

"""The Triton kernels of the forward pass: norms of the keys, and attention from the diagonal to the horizon.

horizon.py has the inequality (*) that says what may be left out. A program attends to the diagonal first, where M is
the running maximum over all keys there, and then asks once how far it must go, with G = min(J + 1, 1 + 1 / m), which is
no less than horizon.py's. The answer comes before the loop on purpose: a loop of known length is pipelined, its loads
run ahead of the matrix products, and a loop that asks on its way is not. All that a later, larger maximum could still
save is its growth / m keys.

The inequality holds between computed numbers: a score that is left out is bounded as these kernels would compute it.
Where m <= 0 or anything is NaN, nothing is left out.

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
from alibi_attention.backends.triton.tiles import FORWARD
from alibi_attention.horizon import NORM_FLOOR, NORM_MARGIN

_NORM_MARGIN = tl.constexpr(NORM_MARGIN)
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)
# Relative rounding of bias and maximum, generously.
_ROUNDING = tl.constexpr(2.0**-20)


@triton.jit(do_not_specialize=LENGTHS)
def key_norms_kernel(
    k_ptr: tl.tensor, norms_ptr: tl.tensor, cu_seqlens_ptr: tl.tensor, tasks_ptr: tl.tensor,
    k_stride_b: int, k_stride_s: int, k_stride_h: int,
    num_groups: int, num_heads: int, num_query_blocks: int, num_key_blocks: int, num_queries: int, num_keys: int,
    query_offset: int, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Store the largest norm of each block's keys [groups, key blocks]; inf for NaN."""
    row, head, group, block, _, first_block = find_task(tasks_ptr, num_groups, num_heads, num_key_blocks, 1)
    start, _, keys, _ = find_extent(row, cu_seqlens_ptr, num_queries, num_keys, query_offset)
    k_ptr = find_base(k_ptr, row, start, head, k_stride_b, k_stride_s, k_stride_h)
    k_NK = load_tile(k_ptr, block * BLOCK, keys, k_stride_s, BLOCK, HEAD_DIM, BLOCK_K, True)
    tl.store(norms_ptr + group * num_key_blocks + first_block + block, tl.max(_norms(k_NK), 0))


@triton.jit
def _norms(x_NK: tl.tensor) -> tl.tensor:
    """Return upper bounds of the tokens' norms, inf for NaN: a maximum would ignore NaN."""
    x_NK = x_NK.to(tl.float32)
    norm_N = tl.sqrt(tl.sum(x_NK * x_NK, 1)) + _NORM_FLOOR
    return tl.where(norm_N == norm_N, norm_N, float("inf"))


@triton.jit
def _maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b)


@triton.jit
def _find_first_key(
    q_MK: tl.tensor, max_M: tl.tensor, rows: tl.tensor, position: tl.tensor, diagonal: tl.tensor,
    norms_ptr: tl.tensor, scale: tl.tensor, slope: tl.tensor, log2_inverse_eps: tl.tensor,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the first key that the tile's queries need, a multiple of BLOCK, given their maxima over the diagonal.

    The tile is treated as one query that has the largest norm and the lowest maximum. All but ``diagonal``, an upper
    limit, is in units of log 2. Keys are asked in blocks, SCAN blocks at once.
    """
    row_M = tl.arange(0, BLOCK)
    reach_M = tl.abs(scale) * _norms(q_MK) * _NORM_MARGIN
    floor_M = max_M - tl.abs(max_M) * _ROUNDING + slope * row_M  # as seen from the tile's first query
    floor_M = tl.where(floor_M == floor_M, floor_M, float("-inf"))
    reach = tl.max(tl.where(row_M < rows, reach_M, 0.0), 0)
    floor = tl.min(tl.where(row_M < rows, floor_M, float("inf")), 0)
    floor = tl.where(slope > 0.0, floor, float("-inf"))

    num_blocks = diagonal // BLOCK
    decay = 1.0 + LOG2E / tl.where(slope > 0.0, slope, 1.0)
    num_left_out = 0
    norm = 0.0
    for first in range(0, num_blocks, SCAN):
        block = first + tl.arange(0, SCAN)
        norms = tl.load(norms_ptr + block, mask=block < num_blocks, other=float("inf"))
        norms = tl.maximum(tl.associative_scan(norms, 0, _maximum), norm)
        last_key = (block + 1) * BLOCK - 1
        growth = tl.log2(tl.minimum((last_key + 1).to(tl.float32), decay))
        bias = slope * (position - last_key) * (1.0 - _ROUNDING)
        left_out = reach * norms + growth + log2_inverse_eps <= floor + bias
        # Whoever may leave out a block may leave out all before it: their number says where to begin.
        num_left_out += tl.sum(left_out.to(tl.int32), 0)
        norm = tl.max(norms, 0)
    return num_left_out * BLOCK


@triton.jit
def _attend_tile(
    acc_MK: tl.tensor, max_M: tl.tensor, sum_M: tl.tensor, q_MK: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, k_stride_s: int, v_stride_s: int,
    key: tl.tensor, keys: tl.tensor, position: tl.tensor, scale: tl.tensor, slope: tl.tensor,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Attend to the keys ``key`` to ``key + BLOCK_N - 1``; some may be hidden if MASKED."""
    row_M = tl.arange(0, BLOCK_M)
    key_N = see_keys(key, keys, position, BLOCK_N, MASKED)
    k_NK = load_tile(k_ptr, key, keys, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, MASKED)
    product_MN = dot(q_MK, tl.trans(k_NK), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if MASKED:
        distance_MN = row_M.to(tl.float32)[:, None] - key_N[None, :]
        score_MN = tl.where(distance_MN >= 0, product_MN * scale - slope * distance_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
        weight_MN = tl.exp2(score_MN - new_max_M[:, None])
    else:
        # The bias as seen from the tile's first query: one addition for each key, fused into the scaling, and not one
        # for each pair. What it is rounded by grows with the row, but less than the row's weights here fall.
        row_shift_M = slope * row_M
        score_MN = product_MN * scale + (slope * key_N)[None, :]
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) - row_shift_M)
        weight_MN = tl.exp2(score_MN - (new_max_M + row_shift_M)[:, None])
    decay_M = tl.exp2(max_M - new_max_M)
    v_NK = load_tile(v_ptr, key, keys, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_K, MASKED)
    acc_MK = dot(round_to(weight_MN, v_NK.dtype), v_NK, acc_MK * decay_M[:, None])
    return acc_MK, new_max_M, sum_M * decay_M + tl.sum(weight_MN, 1)


@FORWARD.tune
@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, o_ptr: tl.tensor, lse_ptr: tl.tensor,
    slopes_ptr: tl.tensor, norms_ptr: tl.tensor, first_keys_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor, tasks_ptr: tl.tensor, softmax_scale: float, log2_inverse_eps: float,
    q_stride_b: int, q_stride_s: int, q_stride_h: int, k_stride_b: int, k_stride_s: int, k_stride_h: int,
    v_stride_b: int, v_stride_s: int, v_stride_h: int, o_stride_b: int, o_stride_s: int, o_stride_h: int,
    num_groups: int, num_heads: int, num_query_blocks: int, num_key_blocks: int, num_queries: int, num_keys: int,
    query_offset: int, length_bucket: int,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Attend for a block of queries (BLOCK_M is BLOCK); store output, base-2 logarithm of the sums, and first key."""
    row, head, group, block, _, first_block = find_task(tasks_ptr, num_groups, num_heads, num_query_blocks, 1)
    start, queries, keys, offset = find_extent(row, cu_seqlens_ptr, num_queries, num_keys, query_offset)
    query = block * BLOCK
    position = offset + query
    scale = softmax_scale * LOG2E
    slope = find_slope(slopes_ptr, head)
    k_ptr = find_base(k_ptr, row, start, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr = find_base(v_ptr, row, start, head, v_stride_b, v_stride_s, v_stride_h)
    q_ptr = find_base(q_ptr, row, start, head, q_stride_b, q_stride_s, q_stride_h)
    q_MK = load_tile(q_ptr, query, queries, q_stride_s, BLOCK_M, HEAD_DIM, BLOCK_K, True)

    acc_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Keys before the diagonal are seen by all queries of the tile. From it on they come in rising order: every query
    # sees the first of them, so that no maximum stays -inf.
    diagonal = tl.minimum(position, keys - 1) // BLOCK * BLOCK
    for key in range(diagonal, tl.minimum(position + tl.minimum(queries - query, BLOCK), keys), BLOCK_N):
        acc_MK, max_M, sum_M = _attend_tile(
            acc_MK, max_M, sum_M, q_MK, k_ptr, v_ptr, k_stride_s, v_stride_s, key, keys, position, scale, slope,
            HEAD_DIM, BLOCK_K, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip

    first_key = 0
    if norms_ptr is not None:
        first_key = _find_first_key(
            q_MK, max_M, queries - query, position, diagonal, norms_ptr + group * num_key_blocks + first_block,
            scale, slope, log2_inverse_eps, BLOCK, SCAN,
        )  # fmt: skip
        tl.store(first_keys_ptr + group * num_query_blocks + first_block + block, first_key)
    for step in range((diagonal - first_key) // BLOCK_N):
        acc_MK, max_M, sum_M = _attend_tile(
            acc_MK, max_M, sum_M, q_MK, k_ptr, v_ptr, k_stride_s, v_stride_s, diagonal - (step + 1) * BLOCK_N, keys,
            position, scale, slope, HEAD_DIM, BLOCK_K, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip

    o_ptr = find_base(o_ptr, row, start, head, o_stride_b, o_stride_s, o_stride_h)
    store_tile(o_ptr, query, queries, o_stride_s, acc_MK / sum_M[:, None], BLOCK_M, HEAD_DIM, BLOCK_K)
    row_M = query + tl.arange(0, BLOCK_M)
    lse_ptr += tl.cast(group, tl.int64) * num_queries + start
    tl.store(lse_ptr + row_M, max_M + tl.log2(sum_M), mask=row_M < queries)

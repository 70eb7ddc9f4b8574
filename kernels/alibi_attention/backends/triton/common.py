"""What the Triton kernels share: which program does what, how tiles are read, and matrix products.

A row is a sequence of the batch, or one of the documents packed into it. Its queries and keys are cut into blocks of
BLOCK tokens, and the horizon is a matter of such blocks: a kernel's own tiles divide them, so that all kernels mean the
same pairs of query and key. A program computes one tile of one head of one row.

Importing this needs Triton; attend.py handles its absence. Shape suffixes of the kernels: M queries of a tile, N keys
of a tile, K head dimension padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alibi_attention.backends.triton.tiles import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two

# Not specialised: a new length would be a new compilation.
LENGTHS = (
    "num_groups", "num_heads", "num_query_blocks", "num_key_blocks", "num_queries", "num_keys", "query_offset",
    "length_bucket",
)  # fmt: skip


@triton.jit
def find_task(
    tasks_ptr: tl.tensor, num_groups: int, num_heads: int, num_blocks: int, TILES: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return this program's row, head, group, block and tile, and where the row's blocks start among all blocks.

    Blocks come in descending order, each with the heads of all rows: the longest causal work starts first, the shortest
    fills the end, and heads that look far run beside heads that do not.

    Args:
        tasks_ptr: Row, block and first block [3, num_blocks] of packed documents; None for rows of one length.
        num_groups: Heads of all rows; of packed documents, heads.
        num_heads: Heads.
        num_blocks: Blocks of a row; of packed documents, all blocks.
        TILES: Tiles of a block.
    """
    group = tl.program_id(0) % num_groups
    slot = tl.program_id(0) // num_groups
    tile = slot % TILES
    slot = slot // TILES
    if tasks_ptr is None:
        row = group // num_heads
        block = num_blocks - 1 - slot
        first_block = slot * 0
    else:
        row = tl.load(tasks_ptr + slot)
        block = tl.load(tasks_ptr + num_blocks + slot)
        first_block = tl.load(tasks_ptr + 2 * num_blocks + slot)
    return row, group % num_heads, group, block, tile, first_block


@triton.jit
def find_extent(
    row: tl.tensor, cu_seqlens_ptr: tl.tensor, num_queries: int, num_keys: int, query_offset: int
) -> tuple[tl.tensor, ...]:
    """Return where a row starts within its batch row, its queries and keys, and the position of its first query."""
    if cu_seqlens_ptr is None:
        start = row * 0
    else:
        start = tl.load(cu_seqlens_ptr + row)
        num_queries = tl.load(cu_seqlens_ptr + row + 1) - start
        num_keys = num_queries
        query_offset = 0
    return start, num_queries, num_keys, query_offset


@triton.jit
def find_base(
    ptr: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    head: tl.tensor,
    stride_b: int,
    stride_s: int,
    stride_h: int,
) -> tl.tensor:
    """Return the address of a row's first token in a [B, S, H, K] tensor; packed documents have stride_b = 0."""
    # 64 bits here, where they cost nothing: a tensor may have more than 2^31 elements.
    row, start, head = tl.cast(row, tl.int64), tl.cast(start, tl.int64), tl.cast(head, tl.int64)
    return ptr + row * stride_b + start * stride_s + head * stride_h


@triton.jit
def load_tile(
    base_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    stride: int,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED: tl.constexpr,
) -> tl.tensor:
    """Return the tokens from ``first`` on [ROWS, BLOCK_K]; zeros past HEAD_DIM and, if RAGGED, from ``end`` on."""
    # 64 bits for the scalar part alone: inside a tile 32 are enough, and half the registers.
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_K)
    tile_ptr = base_ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if RAGGED:
        return tl.load(tile_ptr, mask=(rows[:, None] < end - first) & (dims[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM != BLOCK_K:  # noqa: RET505 - Triton compiles only the branch taken if it is one statement
        return tl.load(tile_ptr, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(tile_ptr)


@triton.jit
def store_tile(
    base_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    stride: int,
    tile: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store the tokens before ``end`` of a tile [ROWS, BLOCK_K], in the tensor's type."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_K)
    tile_ptr = base_ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    mask = (rows[:, None] < end - first) & (dims[None, :] < HEAD_DIM)
    tl.store(tile_ptr, round_to(tile, base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 numbers in another type, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton 3.6's interpreter cuts off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Return acc + a b, summed in fp32; fp32 factors are not rounded to TF32."""
    if _INTERPRETED:  # Triton 3.6's interpreter would multiply the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def find_slope(slopes_ptr: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Return the head's slope in units of log 2; 0 without slopes."""
    if slopes_ptr is None:
        slope = 0.0
    else:
        slope = tl.load(slopes_ptr + head) * LOG2E
    return slope


@triton.jit
def see_keys(
    key: tl.tensor, keys: tl.tensor, position: tl.tensor, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr
) -> tl.tensor:
    """Return where the keys from ``key`` on stand as seen from a position; if RAGGED, those past the end far ahead.

    Small whole numbers in fp32: distances of a tile are differences of two vectors, and exact.
    """
    # Converted apart: the vector once, before a loop over keys, and in it one number instead of BLOCK_N. Conversions
    # run on the unit that computes exp2, the kernels' narrowest. Whole numbers below 2^24: the sum is exact.
    seen_N = tl.arange(0, BLOCK_N).to(tl.float32) + (key - position).to(tl.float32)
    if RAGGED:
        seen_N = tl.where(key + tl.arange(0, BLOCK_N) < keys, seen_N, 2.0**30)
    return seen_N

"""The folded bias on a CPU: PyTorch's own CPU kernel, in local blocks for heads whose horizon is short.

That kernel adds a mask to the scores and takes any strides for it, in its causal mode too. So

- a bias by column costs nothing: one row of m j, read by every query (stride 0). Queries whose keys start where they
  start are attended to in causal mode with it. m j is counted from the middle, and used only where it stays small
  enough for fp32.
- past the first ``window`` tokens of a head with a horizon, queries come in blocks, all blocks in one call: each is
  shown its own keys and the ``window`` keys before it, as overlapping views, under the exact bias, which is linear in
  memory too (sdpa.py: read backwards, the rows of queries are windows of one vector).

Every query belongs to exactly one call, so nothing is merged, and the kernel's backward pass, called with the same
views, gives the gradients. Gradients of keys that several calls saw are summed in fp32.

Shape suffixes: B batch, S sequence, H heads, K head dimension, Q queries of a block, T keys it is shown; in front of
them C is the batch of a call, G its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from alibi_attention.backends.sdpa import reversed_bias

# The operators behind scaled_dot_product_attention on a CPU. Its documentation forbids a mask in causal mode, but only
# older versions refuse one (github.com/pytorch/pytorch/issues/187801), so find_missing tries what the operators do.
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

# fp32 spaces numbers below 64 by 4e-6. A bias by column over w keys lies within m w / 2 of 0.
_MAX_COLUMN_BIAS = 64.0
# Measured: with blocks of b queries a pair of query and key takes about 1 + overhead / b of its time in long rows, and
# in 16 bits less if b is a multiple of 64.
_BLOCK_OVERHEAD, _BLOCK_OVERHEAD_16_BIT = 20.0, 64.0
_BLOCK_MULTIPLE, _BLOCK_MULTIPLE_16_BIT = 16, 64
_MIN_BLOCK = 64
_MAX_BLOCKS_PER_WINDOW = 8
# Heads that see everything but cannot use causal mode, like the queries of a later chunk.
_WIDE_BLOCKS, _MIN_WIDE_BLOCK = 8, 256


def find_missing() -> str:
    """Return what this PyTorch lacks; empty if it can do what is needed."""
    if _forward is None or _backward is None:
        return "this PyTorch has no flash attention for a CPU"
    # Two keys of equal score and a bias of ln 3 for the second, which the first query must not see.
    keys, values, bias = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]).log()
    try:
        output, _ = _forward(keys, keys, values.view(1, 1, 2, 1), 0.0, True, attn_mask=bias.view(1, 1, 1, 2))
    except RuntimeError as error:
        return f"this PyTorch's CPU attention takes no mask in causal mode: {str(error).splitlines()[0]}"
    is_right = torch.allclose(output.flatten(), torch.tensor([1.0, 4.0]))
    return "" if is_right else "this PyTorch's CPU attention takes a mask in causal mode for something else"


@dataclass(frozen=True)
class KernelCall:
    """One call of PyTorch's kernel: blocks of queries, one after the other, each with its keys."""

    first_query: int
    """First query of the first block."""
    queries: int
    """Number of queries of each block."""
    first_key: int
    """First key of the first block; each further block starts ``queries`` keys later."""
    keys: int
    """Number of keys that each block is shown; those of neighbouring blocks overlap."""
    blocks: int = 1
    """The number of blocks of queries."""
    causal: bool = False
    """Whether queries and keys start at one position and the kernel leaves out the future."""

    def cost(self, overhead: float) -> float:
        """Return the pairs of query and key that are computed, weighted by their time."""
        pairs = self.blocks * self.queries * self.keys
        return pairs / 2 if self.causal else pairs * (1 + overhead / self.queries)


def plan_head(
    horizon: int, slope: float, num_queries: int, num_keys: int, query_offset: int, dtype: torch.dtype
) -> tuple[KernelCall, ...]:
    """Return the cheapest calls that show every query at least all keys within a distance of ``horizon``."""
    furthest = query_offset + num_queries - 1
    is_16_bit = dtype.itemsize == 2
    multiple = _BLOCK_MULTIPLE_16_BIT if is_16_bit else _BLOCK_MULTIPLE
    overhead = _BLOCK_OVERHEAD_16_BIT if is_16_bit else _BLOCK_OVERHEAD

    def is_small(window: int) -> bool:
        return query_offset == 0 and abs(slope) * window <= 2 * _MAX_COLUMN_BIAS

    wide_block = max(_MIN_WIDE_BLOCK, -(-num_queries // _WIDE_BLOCKS))
    choices = [_split(0, wide_block, furthest, num_queries, num_keys, query_offset)]
    if is_small(num_queries):
        choices.append((KernelCall(0, num_queries, 0, min(num_queries, num_keys), causal=True),))
    for blocks_per_window in range(1, _MAX_BLOCKS_PER_WINDOW + 1):
        block = max(_MIN_BLOCK, _round_up(-(-horizon // blocks_per_window), multiple))
        window = _round_up(max(horizon, 1), block)
        # The lead takes the remainder, so that all blocks are alike: two calls for a head.
        lead = window + (num_queries - window) % block
        lead = min(lead, num_queries) if is_small(lead) else 0
        if window < furthest:
            choices.append(_split(lead, block, window, num_queries, num_keys, query_offset))
    return min(choices, key=lambda parts: sum(part.cost(overhead) for part in parts))


def _split(
    lead: int, block: int, window: int, num_queries: int, num_keys: int, query_offset: int
) -> tuple[KernelCall, ...]:
    """Return a causal call for the first ``lead`` queries, and calls for blocks that see the ``window`` keys before."""
    parts = [KernelCall(0, lead, 0, min(lead, num_keys), causal=True)] if lead else []
    # Blocks with all their keys are one call; near the ends of queries and keys each block is one.
    first_whole = lead + _round_up(max(0, window - query_offset - lead), block)
    whole_blocks = (min(num_queries, num_keys - query_offset) - first_whole) // block
    start = lead
    while start < num_queries:
        blocks = max(1, whole_blocks) if start == first_whole else 1
        queries = min(block, num_queries - start)
        position = query_offset + start
        first_key = max(0, position - window)
        parts.append(KernelCall(start, queries, first_key, min(position + queries, num_keys) - first_key, blocks))
        start += blocks * queries
    return tuple(parts)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def group_heads(plans: Sequence[tuple[KernelCall, ...]]) -> list[tuple[slice, tuple[KernelCall, ...]]]:
    """Return runs of heads with one plan; a head with several blocks in a call stands alone."""

    def key(head: int) -> tuple[tuple[KernelCall, ...], int]:
        return plans[head], head if any(part.blocks > 1 for part in plans[head]) else -1

    runs = [list(run) for _, run in groupby(range(len(plans)), key)]
    return [(slice(run[0], run[-1] + 1), plans[run[0]]) for run in runs]


class AttendInParts(torch.autograd.Function):
    """Attention of q, k, v [B, S, H, K] by the calls of ``groups``; the slopes are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: torch.Tensor,
        k_BSHK: torch.Tensor,
        v_BSHK: torch.Tensor,
        slopes_H: torch.Tensor,
        groups: list[tuple[slice, tuple[KernelCall, ...]]],
        softmax_scale: float,
        query_offset: int,
    ) -> torch.Tensor:
        """Run every call and put its rows in their place."""
        output_BSHK = torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)
        ctx.biases, log_sums = [], []
        for heads, parts in groups:
            for part in parts:
                bias = _bias(part, slopes_H[heads], query_offset)
                output_CGQK, log_sum = _forward(
                    _queries(part, heads, q_BSHK),
                    _keys(part, heads, k_BSHK),
                    _keys(part, heads, v_BSHK),
                    0.0,
                    part.causal,
                    attn_mask=bias,
                    scale=softmax_scale,
                )
                _set_queries(part, heads, output_BSHK, output_CGQK)
                ctx.biases.append(bias)
                log_sums.append(log_sum)
        ctx.groups, ctx.softmax_scale = groups, softmax_scale
        ctx.save_for_backward(q_BSHK, k_BSHK, v_BSHK, output_BSHK, *log_sums)
        return output_BSHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Run the kernel's backward for every call, with the forward's views."""
        q_BSHK, k_BSHK, v_BSHK, output_BSHK, *log_sums = ctx.saved_tensors
        grad_q_BSHK = torch.empty_like(output_BSHK)
        grad_k_BSHK, grad_v_BSHK = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_BSHK, v_BSHK)
        )
        constants = iter(zip(ctx.biases, log_sums, strict=True))
        for heads, parts in ctx.groups:
            sum_k, sum_v = (_KeySum(parts, x_BSHK[:, :, heads]) for x_BSHK in (grad_k_BSHK, grad_v_BSHK))
            for part in parts:
                bias, log_sum = next(constants)
                grad_q_CGQK, grad_k_CGTK, grad_v_CGTK = _backward(
                    _queries(part, heads, grad_BSHK),
                    _queries(part, heads, q_BSHK),
                    _keys(part, heads, k_BSHK),
                    _keys(part, heads, v_BSHK),
                    _queries(part, heads, output_BSHK),
                    log_sum,
                    0.0,
                    part.causal,
                    attn_mask=bias,
                    scale=ctx.softmax_scale,
                )
                _set_queries(part, heads, grad_q_BSHK, grad_q_CGQK)
                sum_k.add(part, grad_k_CGTK)
                sum_v.add(part, grad_v_CGTK)
            sum_k.store()
            sum_v.store()
        return grad_q_BSHK, grad_k_BSHK, grad_v_BSHK, None, None, None, None


def _bias(part: KernelCall, slopes_H: torch.Tensor, query_offset: int) -> torch.Tensor | None:
    """Return the bias of a call as the kernel wants it, [1, G or 1, Q or 1, T]."""
    if part.causal:
        if not slopes_H.any():
            return None
        column_T = torch.arange(part.keys, dtype=slopes_H.dtype) - (part.keys - 1) / 2
        return (slopes_H[:, None] * column_T)[None, :, None]
    first_position = query_offset + part.first_query - part.first_key
    # Queries beyond the last key may stand closer to it: the rows' shift is free, and small numbers are exact.
    first_position = min(first_position, part.keys - 1)
    return reversed_bias(slopes_H, part.queries, part.keys, first_position + part.queries - 1).unsqueeze(0)


def _queries(part: KernelCall, heads: slice, x_BSHK: torch.Tensor) -> torch.Tensor:
    """Return the queries of a call, or what belongs to them, in the order in which the call reads them."""
    x_CGQK = _cut(x_BSHK, heads, part.first_query, part.queries, part.blocks, part.queries)
    return x_CGQK if part.causal else x_CGQK.flip(2)


def _set_queries(part: KernelCall, heads: slice, x_BSHK: torch.Tensor, value_CGQK: torch.Tensor) -> None:
    """Undo ``_queries``: put a call's results for its queries in their place."""
    x_CGQK = _cut(x_BSHK, heads, part.first_query, part.queries, part.blocks, part.queries)
    x_CGQK.copy_(value_CGQK if part.causal else value_CGQK.flip(2))


def _keys(part: KernelCall, heads: slice, x_BSHK: torch.Tensor) -> torch.Tensor:
    """Return the keys or values that a call reads: a view, overlapping if there are several blocks."""
    return _cut(x_BSHK, heads, part.first_key, part.keys, part.blocks, part.queries)


def _cut(x_BSHK: torch.Tensor, heads: slice, start: int, length: int, blocks: int, step: int) -> torch.Tensor:
    """Return ``blocks`` stretches of ``length`` tokens, each ``step`` further on, as a view [C, G, length, K].

    One stretch is [batch, heads, length, K]; several, of one head, are [blocks, batch, length, K].
    """
    # narrow, not a slice: it fails past the end, where the kernel would read and write what is not ours.
    x_BSHK = x_BSHK.narrow(1, start, (blocks - 1) * step + length)
    if blocks == 1:
        return x_BSHK[:, :, heads].transpose(1, 2)
    return x_BSHK[:, :, heads.start].unfold(1, length, step).permute(1, 0, 3, 2)


_ALL_HEADS = slice(0, None)


class _KeySum:
    """The gradient of some heads' keys or values, summed over calls in fp32 at least."""

    def __init__(self, parts: tuple[KernelCall, ...], result_BSHK: torch.Tensor) -> None:
        self._result_BSHK = result_BSHK
        is_one_call = len(parts) == 1 and parts[0].keys == result_BSHK.shape[1]
        sum_dtype = torch.promote_types(result_BSHK.dtype, torch.float32)
        self._sum_BSHK = None if is_one_call else torch.zeros(result_BSHK.shape, dtype=sum_dtype)

    def add(self, part: KernelCall, grad_CGTK: torch.Tensor) -> None:
        """Add what one call gives; of several blocks, piece by piece, since their keys overlap."""
        if self._sum_BSHK is None:
            self._result_BSHK.copy_(grad_CGTK.transpose(1, 2))
            return
        length = part.keys if part.blocks == 1 else part.queries
        for piece, piece_CGTK in enumerate(grad_CGTK.split(length, dim=2)):
            start = part.first_key + piece * length
            _cut(self._sum_BSHK, _ALL_HEADS, start, length, part.blocks, length).add_(piece_CGTK)

    def store(self) -> None:
        """Round the sum once, into its place."""
        if self._sum_BSHK is not None:
            self._result_BSHK.copy_(self._sum_BSHK)

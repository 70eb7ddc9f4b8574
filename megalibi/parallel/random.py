"""Randomness without state: every draw is a function of a key, so there is nothing to save, to restore or to replay.

Initial weights are keyed by seed, parameter name and position in the full tensor, and so do not depend on the tensor
parallel size.

Dropout masks are keyed by what they are for. The key of a micro batch is derived from the seed and the index of its
first sample, which no other data rank and no other micro batch has::

    micro_batch_key = derive_key(seed, "dropout", first_sample)

and :func:`dropout_key` adds layer, site and shard rank. From that follows:

* Outside a tensor-parallel region (``shard_rank=None``) all tensor ranks draw the same mask, for they hold the same
  activations.
* Where the activations are sharded, every rank passes its tensor rank and draws its own mask. That is so inside a
  tensor-parallel region, as for attention probabilities, whose heads are sharded, and with sequence parallelism
  outside it too, where every rank holds other tokens.
* Activation recomputation draws the same masks again, with ``preserve_rng_state=False``, and a resumed run goes on
  with the masks it would have had: both derive the same keys.

Masks of sharded activations depend on the tensor parallel size: runs that are compared across sizes have no dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalibi.parallel.sharding import ShardSpec, get_shard_spec, shard

ROWS_PER_BLOCK = 256
"""Rows of a weight that are drawn from one key. It is part of what a seed means: another value, other weights."""


def derive_key(*parts: int | str) -> int:
    """Return a key of 63 bits, a hash of the parts, which may be keys themselves.

    Stable across processes, machines and versions. Generators on a CPU use its lowest 32 bits.
    """
    # int(): the repr of a NumPy integer is another one.
    text = repr([part if isinstance(part, str) else int(part) for part in parts])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def dropout_key(micro_batch_key: int, *, layer: int, site: str, shard_rank: int | None) -> int:
    """Return the key of one dropout in one micro batch.

    Args:
        micro_batch_key: Derived from the seed and from what is unique to the micro batch among all of the run.
        layer: Index of the layer.
        site: Which dropout of the layer.
        shard_rank: The tensor rank if the activations are sharded over the tensor group, by heads, columns or sequence;
            None if all of its ranks hold the same.
    """
    return derive_key(micro_batch_key, layer, site, -1 if shard_rank is None else shard_rank)


def keyed_dropout(x: Tensor, p: float, key: int) -> Tensor:
    """Return dropout of ``x`` with the mask that belongs to the key; no global random state is read or changed.

    The same key, shape and kind of device give the same mask. The mask is not kept for the backward but drawn again.

    Args:
        x: Any shape.
        p: Probability of a zero, in [0, 1); what stays is divided by 1 - p.
        key: From :func:`dropout_key`.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p={p}: must be at least 0 and below 1, as a probability of dropping")
    return x if p == 0.0 else _KeyedDropout.apply(x, p, key)


class _KeyedDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: int) -> Tensor:
        ctx.p, ctx.key = p, key
        return _drop(x, p, key)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _drop(grad, ctx.p, ctx.key), None, None


def _drop(x: Tensor, p: float, key: int) -> Tensor:
    # Not empty_like: it follows the strides of x, which the gradient need not have, and would place the zeros by them.
    drop = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    if not x.is_meta:  # which has no generators, and no numbers to draw: a plan asks only what the mask holds
        generator = torch.Generator(x.device)
        generator.manual_seed(key)
        drop.bernoulli_(p, generator=generator)
    return (x / (1.0 - p)).masked_fill_(drop, 0.0)


@contextmanager
def fork_rng(key: int, device: torch.device) -> Iterator[None]:
    """Seed the global random state of the CPU and of a GPU from a key, and restore it on leaving.

    For dropout inside fused kernels (scaled_dot_product_attention), which take no generator.

    Args:
        key: From :func:`dropout_key`.
        device: Where the kernel runs.
    """
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(key)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(key)
        yield


@torch.no_grad()
def init_normal_(param: Tensor, *, seed: int, name: str, std: float, rank: int, size: int) -> None:
    """Fill a parameter, or this rank's shard of it, with normal numbers that depend on seed, name and position alone.

    The full tensor is the same, bit for bit, for every tensor parallel size; padding is zero. It is drawn on the CPU in
    fp32, block of rows by block of rows, so that no rank holds more than a block of it. Of a tensor that is cut along
    dimension 0 a rank draws only the blocks that it needs. No global random state is read or changed.

    Args:
        param: The whole local tensor (under ZeRO 3: gathered); its ShardSpec says what part of the full one it is.
        seed: The seed of the run.
        name: The parameter's name in the model, the same on every rank.
        std: Standard deviation.
        rank: Rank in the tensor group.
        size: Size of the tensor group.
    """
    spec = get_shard_spec(param)
    if spec is None:
        spec, rank, size = ShardSpec(dim=0, full_size=param.shape[0]), 0, 1
    full_shape = list(param.shape)
    full_shape[spec.dim] = spec.full_size
    param.zero_()
    start = 0
    for rows in spec.local_ranges(rank, size) if spec.dim == 0 else [range(full_shape[0])]:
        for first_row, values in _draw_rows(rows, full_shape, std, derive_key(seed, name)):
            local = values if spec.dim == 0 else shard(values, spec, rank, size)
            param.narrow(0, start + first_row - rows.start, len(local)).copy_(local)
        start += len(rows)


def _draw_rows(rows: range, full_shape: list[int], std: float, key: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, values) pieces of the full tensor that make up ``rows``, without those of the padding."""
    generator = torch.Generator()
    num_rows = full_shape[0]
    for block_start in range(rows.start // ROWS_PER_BLOCK * ROWS_PER_BLOCK, min(rows.stop, num_rows), ROWS_PER_BLOCK):
        # Always the whole block: the numbers must not depend on which of its rows a rank needs.
        block_stop = min(block_start + ROWS_PER_BLOCK, num_rows)
        generator.manual_seed(derive_key(key, block_start))
        # torch.normal, because DeepSpeed's zero.Init replaces torch.empty and torch.randn by ones of lower precision.
        shape = (block_stop - block_start, *full_shape[1:])
        block = torch.normal(0.0, std, shape, generator=generator, dtype=torch.float32, device="cpu")
        first, last = max(rows.start, block_start), min(rows.stop, block_stop)
        yield first, block[first - block_start : last - block_start]

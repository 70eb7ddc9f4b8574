"""How a parameter is cut over the tensor group, as data on the parameter.

Initialisation, the optimizer and checkpoints all read it; none of them guesses from names or shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ShardSpec:
    """How the full tensor is cut along one dimension.

    A rank's tensor is the concatenation of its slices of the parts. With 2 parts on 2 ranks, the full tensor is
    ``a0 a1 b0 b1``, rank 0 holds ``a0 b0`` and rank 1 holds ``a1 b1``: so a fused query-key-value weight (3 parts)
    gives every rank the queries, keys and values of the same heads. Checkpoints keep these fields in their manifest.
    """

    dim: int
    """The dimension that is cut."""
    full_size: int
    """The size of that dimension in the full tensor, without padding: the same for every tensor parallel size."""
    parts: int = 1
    """The number of equal parts of the full tensor, each of which is cut on its own."""
    padding: int = 0
    """Zero rows appended to the full tensor so that it can be cut, as to the table of a vocabulary."""

    def __post_init__(self) -> None:
        if self.dim < 0 or self.full_size < 1 or self.parts < 1 or self.padding < 0:
            raise ValueError(f"{self}: dim and padding must be 0 or more, full_size and parts 1 or more")
        if self.parts > 1 and self.padding > 0:
            raise ValueError(f"{self}: a tensor of several parts cannot be padded")

    @property
    def padded_size(self) -> int:
        """The size of the dimension with padding: what all ranks hold together."""
        return self.full_size + self.padding

    def local_size(self, size: int) -> int:
        """Return the size of the dimension on each of ``size`` ranks.

        Raises:
            ValueError: The parts do not divide among the ranks.
        """
        if self.padded_size % (self.parts * size) != 0:
            raise ValueError(f"{self}: {self.parts} x {size} slices do not divide {self.padded_size}")
        return self.padded_size // size

    def local_ranges(self, rank: int, size: int) -> list[range]:
        """Return the indices of the padded dimension that a rank holds, in its own order: one range for each part."""
        length = self.local_size(size) // self.parts
        starts = (part * size * length + rank * length for part in range(self.parts))
        return [range(start, start + length) for start in starts]


def set_shard_spec(param: nn.Parameter, spec: ShardSpec) -> None:
    """Mark a parameter as sharded, for us and for DeepSpeed.

    DeepSpeed counts a parameter without ``model_parallel`` (or ``tensor_model_parallel``) on tensor rank 0 alone, and
    the clipped gradient norm is then wrong without an error.
    """
    param.shard_spec = spec  # type: ignore[attr-defined]
    param.model_parallel = True  # type: ignore[attr-defined]
    param.tensor_model_parallel = True  # type: ignore[attr-defined]


def get_shard_spec(param: Tensor) -> ShardSpec | None:
    """Return how a parameter is cut; None means that every tensor rank holds all of it."""
    return getattr(param, "shard_spec", None)


def shard(full: Tensor, spec: ShardSpec, rank: int, size: int) -> Tensor:
    """Return a rank's own copy of its slices of the full tensor, padded with zeros.

    Raises:
        ValueError: The tensor is not of the full size, or does not divide among the ranks.
    """
    if full.shape[spec.dim] != spec.full_size:
        raise ValueError(f"{spec}: got a tensor of shape {tuple(full.shape)}")
    shape = list(full.shape)
    shape[spec.dim] = spec.local_size(size)
    local = full.new_zeros(shape)
    start = 0
    for indices in spec.local_ranges(rank, size):
        length = max(0, min(indices.stop, spec.full_size) - indices.start)  # without padding
        if length:
            local.narrow(spec.dim, start, length).copy_(full.narrow(spec.dim, indices.start, length))
        start += len(indices)
    return local


def unshard(shards: Sequence[Tensor], spec: ShardSpec) -> Tensor:
    """Return the full tensor, without padding, from the tensors of all ranks in their order.

    Raises:
        ValueError: A tensor does not have the size of a slice.
    """
    expected = spec.local_size(len(shards))
    for local in shards:
        if local.shape[spec.dim] != expected:
            raise ValueError(f"{spec}: expected {expected} of {len(shards)} ranks, got shape {tuple(local.shape)}")
    by_part = [local.unflatten(spec.dim, (spec.parts, -1)) for local in shards]
    full = torch.stack(by_part, dim=spec.dim + 1).flatten(spec.dim, spec.dim + 2)  # [.., parts x ranks x slice, ..]
    return full.narrow(spec.dim, 0, spec.full_size)

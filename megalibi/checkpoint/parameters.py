"""What a checkpoint says of each parameter: enough to read the weights without building the model.

One entry describes a parameter for every tensor rank: its full shape without padding, and how that is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import nn

from megalibi.config import Config
from megalibi.model import DTYPES, GPT
from megalibi.parallel import Group, Layout, ShardSpec, get_shard_spec

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """One parameter of the model, whole.

    Raises:
        ValueError: The fields do not fit each other.
    """

    shape: tuple[int, ...]
    """Its full shape, without padding: the same at every tensor parallel size."""
    dtype: str
    """The precision in which the model computes with it, as PyTorch names it; the optimizer may keep fp32 beside it."""
    shard: ShardSpec | None
    """How the full tensor is cut over the tensor ranks; None: every rank holds all of it."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: must be one of {', '.join(_DTYPES)}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape {self.shape}: must be of sizes above 0")
        if self.shard is not None and self.shape[self.shard.dim : self.shard.dim + 1] != (self.shard.full_size,):
            raise ValueError(f"shape {self.shape} does not fit {self.shard}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as the object that PyTorch has for it."""
        return _DTYPES[self.dtype]

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Return the shape of what each of so many tensor ranks holds, padding included.

        Raises:
            ValueError: The tensor does not divide among the ranks.
        """
        if self.shard is None:
            return self.shape
        sizes = list(self.shape)
        sizes[self.shard.dim] = self.shard.local_size(tensor_parallel_size)
        return tuple(sizes)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> ParameterEntry:
        """Return the entry that ``dataclasses.asdict`` made these fields of, whether or not by way of JSON.

        Raises:
            ValueError, TypeError, KeyError: The fields are not those of an entry.
        """
        shard = fields["shard"]
        spec = None if shard is None else ShardSpec(**shard)
        return cls(**{**fields, "shape": tuple(index(size) for size in fields["shape"]), "shard": spec})


def describe_parameters(model: nn.Module, dtype: torch.dtype) -> dict[str, ParameterEntry]:
    """Return an entry for each parameter, in the model's order; a parameter with several names has the first one.

    Args:
        model: The slices of one tensor rank; ZeRO 3 may have cut them further.
        dtype: The precision in which the model computes.
    """
    entries = {}
    for name, parameter in model.named_parameters():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed's name for the shape before its cut
        spec = get_shard_spec(parameter)
        if spec is not None:
            shape[spec.dim] = spec.full_size
        dtype_name = str(dtype).removeprefix("torch.")
        entries[name] = ParameterEntry(shape=tuple(shape), dtype=dtype_name, shard=spec)
    return entries


def find_ties(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that have several, each with the first name of the same parameter."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first_names[id(parameter)] for name, parameter in names if first_names[id(parameter)] != name}


def build_without_memory(config: Config, *, padded_vocab_size: int, tensor_parallel_size: int) -> GPT:
    """Return what one tensor rank of a run held, on the meta device: shapes without numbers.

    Checkpoints of format 1 do not describe their parameters, and are read by the shapes of this model.
    """
    ranks = tuple(range(tensor_parallel_size))
    group = Group(rank=0, size=tensor_parallel_size, ranks=ranks, handle=None)
    with torch.device("meta"):
        return GPT(config.model, padded_vocab_size=padded_vocab_size, layout=Layout(group))

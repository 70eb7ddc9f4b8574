"""The weights of a checkpoint, whole again: from any tensor parallel size, ZeRO stage, data ranks and precision.

Where DeepSpeed puts them, T being the tensor rank and D the data rank:

- ZeRO 0, 1 and 2: ``mp_rank_T_model_states.pt`` holds the tensors of the rank under ``module``.
- ZeRO 3: each tensor of a rank is flattened, padded to a multiple of the data ranks and cut into as many equal pieces.
  ``zero_pp_rank_D_mp_rank_T_optim_states.pt`` holds the D-th piece of every tensor, in fp32, one after the other;
  ``zero_pp_rank_D_mp_rank_T_model_states.pt`` says in which order (``deepspeed/utils/zero_to_fp32.py``).

Files are memory-mapped and read parameter by parameter: a process that loads a model holds one whole tensor beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import MANIFEST, Manifest
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.checkpoint.reading import open_states
from megalibi.errors import CheckpointError
from megalibi.parallel import unshard

Pieces = dict[str, list[Tensor]]
"""The tensors of one tensor rank by name, each as the flat pieces into which it is cut over the data ranks."""


def assemble_weights(
    folder: Path, manifest: Manifest, parameters: Mapping[str, ParameterEntry]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter, one after the other: whole, without padding, on the CPU. Nothing is verified here.

    Args:
        folder: The checkpoint's folder.
        manifest: The manifest of that checkpoint.
        parameters: What is said of each of its parameters, by name.

    Raises:
        CheckpointError: A file cannot be loaded, would run code, or does not hold what the manifest says.
        FileError: A file may not be read.
    """
    size = manifest.topology["tensor_parallel_size"]
    ranks = [_open_pieces(folder, manifest, rank) for rank in range(size)]
    for name, entry in parameters.items():
        try:
            shape = entry.local_shape(size)
            shards = [_join(pieces[name], shape) for pieces in ranks]
            full = shards[0] if entry.shard is None else unshard(shards, entry.shard)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder} does not hold {name} as {MANIFEST} describes it: {error}") from error
        yield name, full.to(entry.torch_dtype, copy=True)


def _join(pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    padding = flat.numel() - math.prod(shape)  # so that the pieces are of equal size
    if not 0 <= padding < len(pieces):
        raise ValueError(f"{flat.numel()} elements cannot be of shape {shape}")
    return flat[: math.prod(shape)].view(shape)


def _open_pieces(folder: Path, manifest: Manifest, tensor_rank: int) -> Pieces:
    suffix = f"mp_rank_{tensor_rank:02d}"
    if manifest.topology["zero_stage"] < 3:
        module = _open_file(folder, manifest, f"{suffix}_model_states.pt")["module"]
        return {name: [tensor.flatten()] for name, tensor in module.items()}
    pieces: Pieces = {}
    data_size = manifest.topology["data_parallel_size"]
    for data_rank in range(data_size):
        prefix = f"zero_pp_rank_{data_rank}_{suffix}"
        shapes = _open_file(folder, manifest, f"{prefix}_model_states.pt")["param_shapes"]
        optimizer = _open_file(folder, manifest, f"{prefix}_optim_states.pt")["optimizer_state_dict"]
        for name, piece in _cut_groups(shapes, optimizer["fp32_flat_groups"], data_size):
            pieces.setdefault(name, []).append(piece)
    return pieces


def _cut_groups(
    shapes: list[dict[str, torch.Size]], flat_groups: list[Tensor], data_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the pieces that lie one after the other in the flat groups of a data rank; none spans two groups."""
    groups = iter(flat_groups)
    rest = next(groups)
    for name, shape in (item for group in shapes for item in group.items()):
        while rest.numel() == 0:
            rest = next(groups)
        length = math.ceil(shape.numel() / data_size)
        yield name, rest[:length]
        rest = rest[length:]
    assert rest.numel() == 0


def _open_file(folder: Path, manifest: Manifest, ending: str) -> dict[str, Any]:
    """Open a file memory-mapped; DeepSpeed puts ``bf16_`` before some of the names."""
    names = [name for name in (ending, f"bf16_{ending}") if name in manifest.files]
    if not names:
        raise CheckpointError(f"{folder / ending} is not in {MANIFEST}, which lists the files of the checkpoint")
    return open_states(folder / names[0], mmap=True)

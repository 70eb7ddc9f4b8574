"""The weights of a checkpoint, whole again: from any tensor parallel size, ZeRO stage, data ranks and precision.

Where DeepSpeed puts them, T being the tensor rank and D the data rank:

- ZeRO 0, 1 and 2: ``mp_rank_T_model_states.pt`` holds the tensors of the rank under ``module``.
- ZeRO 3: each tensor of a rank is flattened, padded to a multiple of the data ranks and cut into as many equal pieces.
  ``zero_pp_rank_D_mp_rank_T_optim_states.pt`` holds the D-th piece of every tensor, in fp32, one after the other;
  ``zero_pp_rank_D_mp_rank_T_model_states.pt`` says in which order (``deepspeed/utils/zero_to_fp32.py``).

Files are memory-mapped and read parameter by parameter: a process that loads a model holds one whole tensor beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import MANIFEST, Manifest, find_damage, read_manifest
from megalibi.checkpoint.reading import open_states
from megalibi.config import Config, config_from_dict, padded_vocab_size
from megalibi.errors import ConfigError
from megalibi.model import DTYPES, GPT
from megalibi.parallel import ALONE, Group, Layout, get_shard_spec, shard, unshard

Pieces = dict[str, list[Tensor]]
"""The tensors of one tensor rank by name, each as the flat pieces it is cut into over the data ranks."""


def load_model(checkpoint: Path, device: torch.device, group: Group = ALONE) -> GPT:
    """Return the model of a checkpoint, in the precision of its run, ready to be evaluated.

    Args:
        checkpoint: A step's folder, of a run on any topology.
        device: Where the model will compute.
        group: The tensor group that shares the layers; every rank of it loads its own slices.

    Raises:
        ConfigError: The folder is no checkpoint, or a file of it is missing or damaged, and named.
    """
    config = config_from_dict(read_manifest(checkpoint).config)
    # Which kernels can run is a matter of this machine, not of the one that trained.
    model_config = dataclasses.replace(config.model, attention_backend="auto")
    dtype = DTYPES[config.train.precision]
    rows = model_config.vocab_size if group.size == 1 else padded_vocab_size(model_config.vocab_size, group.size)
    with device:
        model = GPT(model_config, padded_vocab_size=rows, layout=Layout(group), compute_dtype=dtype)
    model.to(dtype).requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    for name, full in _full_weights(checkpoint):
        spec = get_shard_spec(parameters[name])
        parameters.pop(name).copy_(full if spec is None else shard(full, spec, group.rank, group.size))
    assert not parameters, f"no weights for {', '.join(parameters)}"
    return model


def load_full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return every parameter of the GPT by name: whole, without padding, in the run's compute precision, on the CPU.

    A tied output layer is one parameter, ``embedding.weight``. Every file of the checkpoint is verified first.

    Args:
        checkpoint: A step's folder.

    Raises:
        ConfigError: The folder is no checkpoint, or a file of it is missing or damaged, and named.
    """
    return dict(_full_weights(checkpoint))


def _full_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``load_full_weights`` returns, one parameter after the other."""
    manifest = read_manifest(checkpoint)
    for damage in find_damage(checkpoint, manifest):
        raise ConfigError(f"{damage}; use another checkpoint")
    config = config_from_dict(manifest.config)
    dtype = DTYPES[config.train.precision]
    ranks = [_open_pieces(checkpoint, manifest, rank) for rank in range(manifest.topology["tensor_parallel_size"])]
    for name, parameter in _tensor_rank_model(config, manifest).named_parameters():
        yield name, _make_whole(parameter, [pieces[name] for pieces in ranks], dtype)


def _tensor_rank_model(config: Config, manifest: Manifest) -> GPT:
    """Return what one tensor rank of the run held, without memory: its shapes and how they are cut."""
    size = manifest.topology["tensor_parallel_size"]
    group = Group(rank=0, size=size, ranks=tuple(range(size)), handle=None)
    with torch.device("meta"):
        return GPT(config.model, padded_vocab_size=manifest.derived["padded_vocab_size"], layout=Layout(group))


def _make_whole(parameter: Tensor, pieces_by_rank: Sequence[list[Tensor]], dtype: torch.dtype) -> Tensor:
    """Return a copy of a parameter that is cut over data ranks, and over tensor ranks unless each has all of it."""
    spec = get_shard_spec(parameter)
    if spec is None:
        return _join(pieces_by_rank[0], parameter.shape).to(dtype, copy=True)
    return unshard([_join(pieces, parameter.shape) for pieces in pieces_by_rank], spec).to(dtype, copy=True)


def _join(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat[: shape.numel()].view(shape)


def _open_pieces(checkpoint: Path, manifest: Manifest, tensor_rank: int) -> Pieces:
    suffix = f"mp_rank_{tensor_rank:02d}"
    if manifest.topology["zero_stage"] < 3:
        module = _open_file(checkpoint, manifest, f"{suffix}_model_states.pt")["module"]
        return {name: [tensor.flatten()] for name, tensor in module.items()}
    pieces: Pieces = {}
    data_size = manifest.topology["data_parallel_size"]
    for data_rank in range(data_size):
        prefix = f"zero_pp_rank_{data_rank}_{suffix}"
        shapes = _open_file(checkpoint, manifest, f"{prefix}_model_states.pt")["param_shapes"]
        optimizer = _open_file(checkpoint, manifest, f"{prefix}_optim_states.pt")["optimizer_state_dict"]
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


def _open_file(checkpoint: Path, manifest: Manifest, ending: str) -> dict[str, Any]:
    """Open a file memory-mapped; DeepSpeed puts ``bf16_`` before some of the names."""
    names = [name for name in (ending, f"bf16_{ending}") if name in manifest.files]
    if not names:
        raise ConfigError(f"{checkpoint / ending} is not in {MANIFEST}, which lists the files of the checkpoint")
    return open_states(checkpoint / names[0], mmap=True)
